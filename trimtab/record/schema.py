"""The record's file format: one SQLite file per rank.

Tables:
    meta(key, value): JSON values: `schema`, `status`, `config`, `environment`, `rank`, `world_size`, ...
    signal(id, name, labels): a signal's name and the JSON list of what its entries belong to: modules ("blocks.0.mlp"),
        heads ("blocks.0.attention/head2"), or `[]` for a single number.
    sample(signal, step, value): one entry a step; `value` is a little-endian float64 array, as long as `labels` (or of
        one element). A blob, because SQLite turns a NaN in a REAL column into NULL.
    event(id, step, kind, message, data, time): what happened besides numbers; `data` is JSON.

Journal mode is WAL with `synchronous=NORMAL`: readers never block the writer, and a committed row survives the death of
the process at any point (a power failure may lose the last commits, but does not corrupt the file).
"""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import RecordError

SCHEMA = 1
"""Version of the format; a reader refuses a newer one by name."""

TABLES = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS signal(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, labels TEXT NOT NULL, UNIQUE(name, labels));
CREATE TABLE IF NOT EXISTS sample(
    signal INTEGER NOT NULL REFERENCES signal(id), step INTEGER NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY(signal, step)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS event(
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL,
    time REAL NOT NULL);
"""


def record_path(folder: Path, rank: int) -> Path:
    """Return the path of one rank's record inside a run's folder."""
    return folder / f"rank{rank}.sqlite"


def check_schema(found: object, path: Path) -> None:
    """Refuse a record of another format version.

    Raises:
        RecordError: if the version is not the one that this trimtab reads.
    """
    if found != SCHEMA:
        raise RecordError(
            f"{path} has record format {found!r}, this trimtab reads format {SCHEMA}: "
            "read it with the version that wrote it."
        )
