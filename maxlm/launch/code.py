"""The code that a launch takes along: an archive of the working copy, or of the installed package."""

import importlib.metadata
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import maxlm
from maxlm.launch.job import LaunchError

PYTHON = "3.12"
"""What machines get: images of TPU VMs have 3.10."""
_KEPT = ("maxlm/", "constraints/", "pyproject.toml", "README.md", "LICENSE")
"""What of a working copy an installation needs."""


def checkout() -> Path | None:
    """The working copy that this program runs from; None if it is an installed package."""
    root = Path(maxlm.__file__).parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def source(root: Path | None) -> str:
    """What pip is to install, relative to the archive's folder."""
    return "code" if root else f"code/{_wheel_name()}"


def pack(path: str, config: str, scripts: dict[str, str]) -> None:
    """Writes a .tar.gz with code/, config.yaml and scripts.

    A working copy goes as it is on disk, changes that are not committed included, so that what runs there is what
    runs here; files that git ignores stay. An installed package goes as the wheel that it came from.

    Args:
        path: the archive.
        config: the run's config.
        scripts: text by name.
    """
    root = checkout()
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**scripts, "config.yaml": Path(config).read_text()}.items():
            _add(archive, name, text.encode(), 0o755 if name in scripts else 0o644)
        if root is None:
            _add(archive, source(None), _wheel())
            return
        for name in _files(root):
            archive.add(root / name, f"code/{name}", recursive=False)


def setup(extra: str, root: Path | None) -> list[str]:
    """Lines of a bash script that install the code in the archive's folder, into ./venv.

    Args:
        extra: of pyproject.toml, for the machine.
        root: the working copy, if it is one.
    """
    pins = f"code/constraints/py{PYTHON.replace('.', '')}.txt"
    constraint = f"--constraint {pins} " if root and (root / pins.removeprefix("code/")).is_file() else ""
    return [
        "python3 -m pip install --quiet --user uv || pip3 install --quiet --user --break-system-packages uv",
        f'"$HOME/.local/bin/uv" venv --quiet --allow-existing --python {PYTHON} venv',
        f'"$HOME/.local/bin/uv" pip install --quiet --python venv/bin/python {constraint}"./{source(root)}[{extra}]"',
    ]


def _files(root: Path) -> list[str]:
    """Files of a working copy, without those that git ignores where there is git."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_KEPT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(f"git does not say which files {root} has: {done.stderr.strip()}")
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [str(path.relative_to(root)) for kept in _KEPT for path in _walk(root / kept)]
    return sorted(name for name in names if (root / name).is_file() and "__pycache__" not in name)


def _walk(path: Path) -> Iterator[Path]:
    yield from path.rglob("*") if path.is_dir() else [path]


def _wheel_name() -> str:
    return f"maxlm-{importlib.metadata.version('maxlm')}-py3-none-any.whl"


def _wheel() -> bytes:
    """The installed package as a wheel again."""
    distribution = importlib.metadata.distribution("maxlm")
    left_out = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}
    found, records = io.BytesIO(), []
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in distribution.files or []:
            info = file.parts[0].endswith(".dist-info")
            if "__pycache__" in file.parts or not (info or file.parts[0] == "maxlm") or file.name in left_out:
                continue
            wheel.writestr(file.as_posix(), Path(str(distribution.locate_file(file))).read_bytes())
            records.append(f"{file.as_posix()},,")
        record = f"maxlm-{distribution.version}.dist-info/RECORD"
        wheel.writestr(record, "\n".join([*records, f"{record},,", ""]))
    return found.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), mode, int(os.path.getmtime(maxlm.__file__))
    archive.addfile(entry, io.BytesIO(data))
