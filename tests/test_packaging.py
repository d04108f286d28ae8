"""The wheel holds the whole package, and installs and runs outside the repository."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = [(3, 11), (3, 12), (3, 13)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_every_module_and_table_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "maxlm").rglob("*") if p.suffix in (".py", ".csv")}
    assert "maxlm/plan/prices.csv" in files and files <= names
    assert {name.split("/")[0] for name in names} == {"maxlm"}


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_repository(wheel, tmp_path):
    """In a fresh environment that borrows this one's dependencies, but not its maxlm."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, cwd=tmp_path)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # A folder named in a .pth file joins sys.path, but its own .pth files (an editable maxlm) are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(site) in run(str(python), "-c", "import maxlm; print(maxlm.__file__)")
    assert "usage" in run(str(environment / "bin" / "maxlm"), "--help").lower()
    assert "usage" in run(str(python), "-m", "maxlm", "--help").lower()


@pytest.mark.parametrize("version", SUPPORTED, ids=lambda v: f"{v[0]}.{v[1]}")
def test_constraints_name_versions_and_nothing_else(version):
    """One file per supported Python; lines like jax==0.10.2, without addresses or local versions."""
    lines = (ROOT / "constraints" / f"py{version[0]}{version[1]}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins and not [pin for pin in pins if pin.count("==") != 1 or set(pin) & set("/:@+ ")]


@pytest.mark.skipif(sys.version_info[:2] not in SUPPORTED, reason="no constraints for this Python")
def test_make_refuses_a_python_it_cannot_use(tmp_path):
    """Each refusal names the way out and leaves no half-made environment behind."""

    def refusal(script: str) -> str:
        fake = tmp_path / "fake-python"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        command = ["make", "--no-print-directory", "quickstart", f"VENV={tmp_path / 'venv'}", f"PYTHON={fake}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and not (tmp_path / "venv").exists(), done.stdout
        return done.stderr

    assert "3.11 to 3.13" in refusal("echo 3.9") and "PYTHON=python3" in refusal("echo 3.9")
    assert "3.11 to 3.13" in refusal("echo 3.14")
    assert "does not run" in refusal("exit 127")
    no_ensurepip = 'case "$*" in *ensurepip*) exit 1 ;; *version_info*) echo 3.11 ;; esac'
    assert "sudo apt install python3-venv" in refusal(no_ensurepip)
    broken_venv = 'case "$*" in *version_info*) echo 3.11 ;; *"-m venv"*) exit 1 ;; esac'
    assert "venv failed" in refusal(broken_venv)
