"""Writes constraints/py3XX.txt: the newest versions that fit pyproject.toml on the Python that runs this.

pip resolves every extra at once and installs nothing, so the answer does not depend on what is installed. Names and
versions only: no addresses, no local version labels (`2.13.0+cpu`), and no NVIDIA libraries, which jax and torch each
pin for themselves. Run it once per supported Python: `make lock PYTHON=python3.12`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Resolved with the rest they would have to agree with each other, which jax's and torch's do not always.
LEFT_OUT_EXTRAS = {"cuda", "cuda12"}
LEFT_OUT = re.compile(r"^(nvidia|cuda|triton)\b")


def resolve(extras: list[str]) -> dict[str, str]:
    """Returns the version pip would install of each package, by normalized name.

    Args:
      extras: Names of the extras of pyproject.toml to resolve together.

    Raises:
      subprocess.CalledProcessError: When pip finds no set of versions that fits.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*pip, "--report", str(report), f"{ROOT}[{','.join(extras)}]"], check=True)
        found = json.loads(report.read_text())["install"]
    versions = {}
    for package in found:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        versions[name] = package["metadata"]["version"].partition("+")[0]
    return versions


def main() -> None:
    """Resolves all extras and writes the constraints file of this Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write (default: constraints/py3XX.txt of this Python)")
    args = parser.parse_args()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    out = args.out or ROOT / "constraints" / f"py{python.replace('.', '')}.txt"

    versions = resolve(sorted(set(project["optional-dependencies"]) - LEFT_OUT_EXTRAS))
    kept = {name: v for name, v in versions.items() if name != project["name"] and not LEFT_OUT.match(name)}
    header = f"# Versions tried together on Python {python}; written by `make lock`.\n"
    out.write_text(header + "".join(f"{name}=={kept[name]}\n" for name in sorted(kept)))
    print(f"{out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}: {len(kept)} packages")


if __name__ == "__main__":
    main()
