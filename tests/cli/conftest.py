"""How the tests call the command line: in this process, from an empty folder, with its output taken apart."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from trimtab.cli import main


class Called(NamedTuple):
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Called:
    """Run `trimtab ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Called(code, out.getvalue(), err.getvalue())


@pytest.fixture
def trimtab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Called]:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def refused(trimtab: Callable[..., Called]) -> Callable[..., str]:
    """The command line where it must refuse: exit code 2, one line on standard error, nothing else."""

    def check(*arguments: str, code: int = 2) -> str:
        found = trimtab(*arguments)
        assert (found.code, found.out) == (code, ""), found
        lines = found.err.splitlines()
        assert len(lines) == 1, found
        assert lines[0].startswith("trimtab: ")
        return lines[0]

    return check
