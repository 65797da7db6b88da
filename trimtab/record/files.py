"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from trimtab.errors import RecordError


def write_whole(path: Path, text: str, *, what: str = "") -> None:
    """Write text so that `path` holds the old file or the new one, never a part, whatever kills the process.

    Args:
        path: the file; its folder is made if it is missing.
        text: its content, written as UTF-8.
        what: what the file is, for the error message (`"the report "`).

    Raises:
        RecordError: if it cannot be written; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be reached
            partial.unlink(missing_ok=True)
        raise RecordError(f"cannot write {what}{path}: {error.strerror or error}.") from error
