"""Programs of others that launches call: gcloud, kubectl, sbatch, sky."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from maxlm import places
from maxlm.config_file import ConfigError
from maxlm.launch.job import LaunchError

INSTALL = {
    "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk/docs/install)",
    "kubectl": "install it with gcloud components install kubectl gke-gcloud-auth-plugin",
    "sbatch": "run this on a login node of the cluster",
    "sky": "install it with pip install 'skypilot[gcp]'",
}


def need(tool: str, via: str) -> None:
    """Raises ConfigError if a program is not there, with how to get it."""
    if shutil.which(tool) is None:
        raise ConfigError(f"--via {via} needs {tool}, which is not here: {INSTALL[tool]}")


def call(argv: Sequence[str], text: str | None = None) -> str:
    """Runs a program and returns what it printed.

    Args:
        argv: program and arguments.
        text: for its standard input.

    Raises:
        LaunchError: it failed; in its own words.
    """
    try:
        done = subprocess.run(argv, input=text or "", capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{argv[0]} is not here: {INSTALL.get(argv[0], 'install it')}") from None
    if done.returncode:
        raise LaunchError(f"{argv[0]}: {reason(done.stderr or done.stdout)}")
    return done.stdout


def shown(argv: Sequence[str]) -> str:
    """A command line as people write it: --flag='a value'."""

    def word(text: str) -> str:
        name, equals, value = text.partition("=")
        return f"{name}={shlex.quote(value)}" if equals and text.startswith("--") else shlex.quote(text)

    return " ".join(map(word, argv))


def reason(said: str) -> str:
    """The sentence that matters in what a program printed before it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it failed without a word"]
    start = next((i for i, line in enumerate(lines) if line.lower().startswith("error")), len(lines) - 1)
    text = re.sub(r"^ERROR: (\(gcloud[\w.\- ]*\) )?", "", " ".join(lines[start : start + 6]))
    return places.redacted(text)[:600]
