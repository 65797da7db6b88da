"""The command line: `trimtab` and `python -m trimtab`."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what follows the program's name; `sys.argv` by default.

    Returns:
        0 if all is well, 1 if a run failed or the doctor found something, 2 if the command was used wrongly, 130 after
        Ctrl-C.
    """
    from trimtab.cli.app import run

    return run(arguments)
