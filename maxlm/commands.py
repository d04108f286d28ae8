"""How a command line of maxlm gets one more command."""

import argparse
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a command to those of a parser.

    Args:
        commands: what add_subparsers returned.
        name: as it is typed.
        run: does it, and returns the exit code; raises ValueError or OSError with one sentence for what the user can
            mend.
        text: what it does, without a full stop; begins with a small letter.
        examples: printed as they stand below the options.

    Returns:
        Its parser, for its options.
    """
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command
