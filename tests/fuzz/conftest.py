"""What the tests of more than one kind of file need."""

import contextlib
import os
import sys

import pytest

OPENED: list[str] | None = None


def _note(event, args):
    if event == "open" and OPENED is not None and isinstance(args[0], str | bytes):
        OPENED.append(os.path.realpath(os.fsdecode(args[0])))


@pytest.fixture(scope="session")
def opened():
    """A context manager that gives the paths that are opened inside it."""
    sys.addaudithook(_note)

    @contextlib.contextmanager
    def recorded():
        global OPENED
        OPENED = []
        try:
            yield OPENED
        finally:
            OPENED = None

    return recorded
