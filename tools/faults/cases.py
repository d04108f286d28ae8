"""The faults, by name."""

from collections.abc import Callable
from typing import NamedTuple

from tools.faults import damage, disk, hang, hosts, kills, meshes, nan, resume, sigterm, soak
from tools.faults.outcome import Outcome
from tools.faults.work import Work


class Case(NamedTuple):
    """A kind of fault: what it tries, and the function that does."""

    about: str
    run: Callable[[Work], list[Outcome]]


CASES = {
    "kills": Case("SIGKILL at random moments, 200 MB checkpoints", kills.run),
    "damage": Case("each file of the newest checkpoint changed, cut off or deleted", damage.run),
    "disk": Case("a disk that is full, forbidden or gone during a save", disk.run),
    "sigterm": Case("SIGTERM in every phase", sigterm.run),
    "hosts": Case("one of two hosts is killed or asked to stop", hosts.run),
    "nan": Case("steps whose loss is not a number", nan.run),
    "twice": Case("2 N steps against N and N", resume.twice),
    "fewer-hosts": Case("4, 2 and 1 hosts read the same batches", resume.fewer_hosts),
    "meshes": Case("state saved on one mesh and restored on another", meshes.run),
    "hang": Case("a run that hangs, in its data or in a collective", hang.run),
    "soak": Case("one run over many meshes and deaths", soak.run),
}
