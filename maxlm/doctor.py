"""`maxlm doctor`: what this machine is, and whether what a run needs of it works; one screen for a bug report."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

import maxlm
from maxlm import hosts, places, storage, units
from maxlm.config import Config, MeshConfig, RunConfig, TrainConfig
from maxlm.hardware import detect
from maxlm.mesh import axis_sizes, check_fit, choose_devices, make_mesh, start_devices
from maxlm.mesh_check import COLLECTIVES, Collective, Outcome, check_mesh, sentence, within

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
BACKENDS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
DEVELOPMENT = ("test", "oracles", "lint")
"""Extras that only who works on maxlm installs."""
ANSWER_S = 60.0
"""A collective, a disk or another host that gives no answer for so long fails its check, in seconds."""
IN_ONE = ("software", "machine", "extras")
"""Sections whose rows are short enough for one paragraph."""
PROBE = os.urandom(1 << 16)


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: what it is about.
        text: for people; of a failed check, its error in one sentence.
        ok: whether the check passed; None where there is nothing to pass.
        data: the same in figures, for --json.
    """

    name: str
    text: str
    ok: bool | None = None
    data: dict[str, Any] = field(default_factory=dict)


Report = dict[str, list[Row]]


def doctor(config: Config | None, *, as_json: bool = False, collectives: Sequence[Collective] = COLLECTIVES) -> int:
    """Examines this machine, or all hosts of a run together, and prints what it found on the first of them.

    Args:
        config: the run whose mesh and folders are tried; None: all devices on one fsdp axis, and the default folders.
        as_json: print JSON.
        collectives: what is tried over each axis of the mesh.

    Returns:
        Exit code: 0 if all checks passed, here and on the other hosts, else 1.
    """
    report, hangs = examine(config, collectives)
    plain = {section: [dataclasses.asdict(row) for row in rows] for section, rows in report.items()}
    reports = hosts.gather(json.dumps(plain), ANSWER_S)
    merged = _merge(report, reports[1:])
    failed = [row for rows in merged.values() for row in rows if row.ok is False]
    if hosts.is_first():
        if as_json:
            print(json.dumps({"ok": not failed, "sections": _as_json(merged)}, indent=1))
        else:
            print(_as_text(merged, failed))
    code = 1 if failed else 0
    if hangs:  # a thread sits in a device, and would keep the process from its end
        sys.stdout.flush()
        os._exit(code)
    return code


def examine(config: Config | None, collectives: Sequence[Collective] = COLLECTIVES) -> tuple[Report, bool]:
    """All checks of this host, each on its own: one that fails is a row, and the next one runs.

    Args:
        config: as doctor's.
        collectives: as doctor's.

    Returns:
        The report, and whether a check never came back.
    """
    mesh_config = config.mesh if config else MeshConfig()
    root = config.run.root if config else RunConfig().root
    cache = config.train.compilation_cache if config else TrainConfig.model_fields["compilation_cache"].default
    devices: list[Any] = []
    meshes: list[Mesh] = []
    outcomes: list[Outcome] = []

    def start() -> list[Row]:
        devices.extend(start_devices(mesh_config))
        return device_rows(devices)

    def lay() -> list[Row]:
        if not devices:
            return [Row("mesh", "not tried: there are no devices")]
        chosen, own = choose_devices(config, devices) if config else (None, devices)
        meshes.append(make_mesh(mesh_config, own))
        return mesh_rows(meshes[0], chosen)

    def talk() -> list[Row]:
        for mesh in meshes:
            outcomes.extend(check_mesh(mesh, collectives, ANSWER_S))
        return collective_rows(outcomes, bool(meshes))

    checks: dict[str, Callable[[], list[Row]]] = {
        "software": software_rows,
        "machine": machine_rows,
        "environment": environment_rows,
        "devices": start,
        "mesh": lay,
        "collectives": talk,
        "disk": lambda: [disk_row("run.root", root), disk_row("train.compilation_cache", cache)],
        "extras": extra_rows,
    }
    return {name: _guarded(name, check) for name, check in checks.items()}, any(o.hangs for o in outcomes)


def software_rows() -> list[Row]:
    """Versions of what a run's numbers depend on."""
    found = {"maxlm": maxlm.__version__, "Python": platform.python_version()}
    found |= {name: version for name in (*PACKAGES, *BACKENDS) if (version := _version(name))}
    return [Row(name, version, data={"version": version}) for name, version in found.items()]


def machine_rows() -> list[Row]:
    """The host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [
        Row("platform", platform.platform(), data={"platform": platform.platform()}),
        Row("cores", str(cores), data={"num_cores": cores}),
        Row("memory", units.size(memory_bytes), data={"memory_bytes": memory_bytes}),
    ]


def environment_rows() -> list[Row]:
    """Variables that change what JAX does, credentials left out."""
    shown = lambda name, value: "set, not shown" if places.SECRET.search(name) else places.redacted(value)  # noqa: E731
    named = {k: shown(k, v) for k, v in sorted(os.environ.items()) if re.match(r"JAX_|XLA_|LIBTPU_INIT_ARGS$", k)}
    return [Row(name, value, data={"value": value}) for name, value in named.items()]


def device_rows(devices: Sequence[Any]) -> list[Row]:
    """What JAX has to compute with.

    Args:
        devices: all devices of all hosts.
    """
    first, chip = devices[0], detect(devices[0])
    where = [{"id": d.id, "kind": d.device_kind, "host": d.process_index, **_place(d)} for d in devices]
    num_hosts = len({place["host"] for place in where})
    num_slices = len({place.get("slice") for place in where})
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    data = {"num_devices": len(devices), "num_hosts": num_hosts, "num_slices": num_slices, "devices": where}
    text = f"{len(devices)} x {kinds}, hosts {num_hosts}, slices {num_slices}"
    rows = [
        Row("devices", text, True, data),
        Row("runtime", " ".join(first.client.platform_version.split()), data={"platform": first.platform}),
    ]
    if all("coords" in place for place in where):
        torus = [len(set(along)) for along in zip(*(place["coords"] for place in where), strict=True)]
        rows.append(Row("torus", " x ".join(map(str, torus)) + " per slice", data={"torus": torus}))
    usable = next((s.get("bytes_limit") for d in jax.local_devices() if (s := d.memory_stats())), None)
    if chip or usable:
        known = f"{units.size(chip.hbm_bytes)} ({chip.name})" if chip else "not in the catalog"
        text = known + (f", {units.size(usable)} usable" if usable else "")
        data = {"hbm_bytes": chip.hbm_bytes if chip else None, "usable_bytes": usable}
        rows.append(Row("HBM per device", text, data=data))
    return rows


def mesh_rows(mesh: Mesh, config: Config | None) -> list[Row]:
    """The mesh as the run would have it, and whether the run divides over it.

    Args:
        mesh: from make_mesh.
        config: the run, if there is one.
    """

    def fit(config: Config) -> list[Row]:
        check_fit(config, axis_sizes(config.mesh, mesh.size))
        return [Row("model and batch", "divide over it", True)]

    text = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    rows = [Row("axes", text, True, {"axes": dict(mesh.shape)})]
    return rows + (_guarded("model and batch", lambda: fit(config)) if config else [])


def collective_rows(outcomes: Sequence[Outcome], tried: bool) -> list[Row]:
    """One row for each axis and collective.

    Args:
        outcomes: from check_mesh.
        tried: there was a mesh to try.
    """
    if not tried:
        return [Row("collectives", "not tried: there is no mesh")]
    if not outcomes:
        return [Row("collectives", "none: no axis of the mesh has more than one device")]
    rows = []
    for o in outcomes:
        text = o.problem or f"{1e3 * (o.time_s or 0):.2f} ms"
        data = {"axis": o.axis, "collective": o.collective, "time_s": o.time_s, "wrong_devices": o.wrong_devices}
        rows.append(Row(f"{o.axis} {o.collective}", text, not o.problem, data))
    return rows


def disk_row(name: str, path: str | None) -> Row:
    """Whether a folder or bucket takes a small file, gives it back and deletes it.

    Args:
        name: the config's field.
        path: its value; None is a folder that is not wanted. A local folder that is not there yet is not made:
            the nearest one above it is tried.
    """
    if path is None:
        return Row(name, "turned off")
    folder, free_bytes = os.path.expanduser(path), None
    try:
        if not storage.is_bucket(folder):
            folder = os.path.abspath(folder)
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
            free_bytes = shutil.disk_usage(folder).free
        time_s = within(ANSWER_S, lambda: _probe(storage.join(folder, f".maxlm-doctor-{uuid.uuid4().hex[:8]}")))
    except Exception as error:
        return Row(name, f"{path}: {sentence(error)}", False, {"path": path, "free_bytes": free_bytes})
    free = "" if free_bytes is None else f", {units.size(free_bytes)} free"
    text = f"{path}: writable in {units.duration(time_s)}{free}"
    return Row(name, text, True, {"path": path, "free_bytes": free_bytes, "write_s": time_s})


def extra_rows() -> list[Row]:
    """Which of maxlm's optional packages are there."""
    rows = []
    for extra, requirements in _extras().items():
        needed = list(dict.fromkeys(name for r in requirements for name in _distributions(r)))
        missing = [name for name in needed if not _version(name)]
        text = f"no ({', '.join(missing)})" if missing else "yes"
        rows.append(Row(extra, text, data={"installed": not missing, "missing": missing}))
    return rows


def _guarded(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    try:
        return check()
    except Exception as error:
        return [Row(name, sentence(error), ok=False)]


def _place(device: Any) -> dict[str, Any]:
    place = {"slice": getattr(device, "slice_index", None), "coords": getattr(device, "coords", None)}
    return {key: value for key, value in place.items() if value is not None}


def _probe(path: str) -> float:
    """Writes, reads and deletes a file; returns the seconds that the write took."""
    started = time.perf_counter()
    storage.write_bytes(path, PROBE)
    time_s = time.perf_counter() - started
    try:
        if storage.read_bytes(path) != PROBE:
            raise storage.StorageError(f"{path} does not hold what was written to it")
    finally:
        storage.remove_tree(path)
    return time_s


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """Requirements of each extra for users; of a checkout that is not installed, from its pyproject.toml."""
    if _version("maxlm"):
        names = importlib.metadata.metadata("maxlm").get_all("Provides-Extra") or []
        extras = {name: _of_extra("maxlm", name) for name in names}
    else:
        project = Path(maxlm.__file__).parent.parent / "pyproject.toml"
        extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    return {name: requirements for name, requirements in extras.items() if name not in DEVELOPMENT}


def _of_extra(distribution: str, extra: str) -> list[str]:
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [r for r in requirements if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", r)]


def _distributions(requirement: str) -> Iterator[str]:
    """The distributions that a requirement such as `jax[tpu]>=1; marker` brings: jax, libtpu."""
    name, extras = re.match(r"([\w.-]+)(?:\[([\w.,\s-]+)\])?", requirement).groups()  # pyrefly: ignore
    yield name
    for extra in (extras or "").split(","):
        for inner in _of_extra(name, extra.strip()) if extra else ():
            yield from _distributions(inner)


def _merge(report: Report, others: Sequence[str | None]) -> Report:
    """Adds what failed on other hosts, and where their versions differ from those of the first."""
    merged = {section: list(rows) for section, rows in report.items()}
    for host, text in enumerate(others, 1):
        if text is None:
            merged["devices"].append(Row(f"host {host}", f"sent no report within {ANSWER_S:g} s", ok=False))
            continue
        there = {section: [Row(**row) for row in rows] for section, rows in json.loads(text).items()}
        for section, rows in there.items():
            merged[section] += [dataclasses.replace(r, name=f"host {host}: {r.name}") for r in rows if r.ok is False]
        here = {row.name: row.text for row in report["software"]}
        for row in there["software"]:
            if row.text != here.get(row.name):
                text = f"{row.text}, but {here.get(row.name, 'none')} on host 0"
                merged["software"].append(Row(f"host {host}: {row.name}", text, False, row.data))
    return merged


def _as_json(report: Report) -> dict[str, list[dict[str, Any]]]:
    def plain(row: Row) -> dict[str, Any]:
        return {"name": row.name, "ok": row.ok, "text": row.text, **row.data}

    return {section: [plain(row) for row in rows] for section, rows in report.items()}


def _as_text(report: Report, failed: Sequence[Row]) -> str:
    console = Console(width=min(Console().width, 100), highlight=False, emoji=False, markup=False, color_system=None)
    with console.capture() as capture:
        for section, rows in report.items():
            if rows:
                console.print(section)
                for table in _tables(section, rows):
                    console.print(Padding(table, (0, 0, 0, 2)))
    checks = sum(row.ok is not None for rows in report.values() for row in rows)
    end = f"{len(failed)} of {checks} checks failed" if failed else f"all {checks} checks passed"
    return "\n".join(line.rstrip() for line in [*capture.get().splitlines(), end])


def _tables(section: str, rows: Sequence[Row]) -> Iterator[Table | Text]:
    if section in IN_ONE:
        yield Text(", ".join(f"{row.name} {row.text}" for row in rows if row.ok is None))
        rows = [row for row in rows if row.ok is not None]
    tried = [row for row in rows if "axis" in row.data]
    if tried:
        yield _matrix(tried)
        rows = [row for row in rows if row.ok is not True]
    table = Table.grid(Column(), Column(), Column(overflow="fold"), padding=(0, 2))
    for row in rows:
        table.add_row({True: "ok", False: "FAIL", None: ""}[row.ok], Text(row.name), Text(row.text))
    if rows:
        yield table


def _matrix(rows: Sequence[Row]) -> Table:
    """Axes down, collectives across, milliseconds in the cells."""
    table = Table.grid(padding=(0, 2))
    table.add_row("", *dict.fromkeys(row.data["collective"] for row in rows))
    for axis in dict.fromkeys(row.data["axis"] for row in rows):
        table.add_row(axis, *(row.text if row.ok else "FAIL" for row in rows if row.data["axis"] == axis))
    return table
