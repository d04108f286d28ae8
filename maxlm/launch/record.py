"""What this machine remembers of its launches, so that they can be looked at and stopped by name.

~/.local/state/maxlm/launch/NAME/ (or under XDG_STATE_HOME) holds job.json, the archive of the code that runs, and the
logs that were fetched.
"""

import difflib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from maxlm import storage
from maxlm.config_file import ConfigError
from maxlm.launch.job import Job, from_json


def folder(name: str) -> Path:
    """Where what is known of a launch lies."""
    return _all() / name


def write(job: Job, **facts: Any) -> None:
    """Remembers a launch and facts about it, such as its zone; earlier facts stay."""
    path = folder(job.name) / "job.json"
    known = read(job.name)[1] if path.exists() else {}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    storage.write_bytes(str(path), json.dumps({"job": job.to_json(), **known, **facts}, indent=1).encode())


def read(name: str) -> tuple[Job, dict[str, Any]]:
    """A launch by its name, and the facts about it.

    Raises:
        ConfigError: this machine knows no such launch; names those that it knows.
    """
    path = folder(name) / "job.json"
    if "/" in name or not path.is_file():
        known = sorted(p.name for p in _all().glob("*") if (p / "job.json").is_file())
        near = difflib.get_close_matches(name, known, 3, 0.3) or known[:5]
        raise ConfigError(
            f"nothing named {name} was launched from this machine; "
            + (f"there are {', '.join(near)}" if near else "look in the cloud's console, or launch it from here first")
        )
    try:
        facts = TypeAdapter(Any).validate_json(path.read_bytes())
        return from_json(facts.pop("job")), facts
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged; stop {name} in the cloud's console, then remove {path.parent}") from None


def is_stopped(job: Job) -> bool:
    """Whether a launch was stopped, or another one took its name, since it was written."""
    if not (folder(job.name) / "job.json").exists():
        return True
    there, facts = read(job.name)
    return there.id != job.id or bool(facts.get("stopped"))


def forget(name: str) -> None:
    """Nothing of it is left in the cloud."""
    shutil.rmtree(folder(name), ignore_errors=True)


def _all() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "maxlm" / "launch"
