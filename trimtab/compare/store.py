"""The files of a comparison's folder: written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import RecordError, UsageError
from trimtab.record.files import write_whole

try:
    import fcntl
except ImportError:  # no such lock on Windows: two processes in one folder then repeat work, but harm nothing
    fcntl = None  # type: ignore[assignment]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that `path` holds the old file or the new one, never a part, whatever kills the process.

    Raises:
        RecordError: if it cannot be written; the old file is still there.
    """
    write_whole(path, json.dumps(data, indent=1))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what `write_json` wrote, or None if the file is missing or is not a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_results(path: Path, kind: str, data: Mapping[str, Any]) -> None:
    """Write a result file with strict JSON inside (a number that is not finite becomes null).

    Raises:
        RecordError: if it cannot be written.
        UsageError: if another kind of file already has that name: it is not ours to replace.
    """
    if path.exists() and (read_json(path) or {}).get("kind") != kind:
        raise UsageError(f"{path} exists and is not a {kind} of trimtab: choose another folder.")
    write_json(path, {"kind": kind, **strict(data)})


def strict(value: Any) -> Any:
    """Return a copy of plain data in which every number that is not finite is None, as strict JSON needs.

    Example:
        >>> strict({"low": float("-inf"), "n": 1})
        {'low': None, 'n': 1}
    """
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for this process; the lock goes with the process, however it ends.

    Raises:
        UsageError: if another process works in it.
        RecordError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RecordError(f"cannot write in {folder}: {error.strerror or error}.") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is working in {folder}: wait for it, or choose another.") from None
            except OSError:  # a file system without locks
                pass
        yield
