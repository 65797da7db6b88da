"""The shared folder of a population: plans, decisions, records and claims, by files that appear whole and once.

    population-plan.json                what is asked for; every command that joins must ask for the same
    members/003/00007.decision.json     where interval 7 of member 3 starts from, and with which values
    members/003/00007-WORKER/           its checkpoint
    members/003/00007.json              its record: once it is there, the interval is finished
    claims/003-00007.0                  the worker that is at it; .1 is whoever took it over, and so on
    leases/                             which workers live

A file that may be written once only is written beside its place and linked to it: the second link fails. So an interval
counts once even if two workers finish it, and whoever repeats a lost one repeats its decision too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.compare.store import read_json, strict
from trimtab.errors import RecordError, UsageError
from trimtab.record import latest_checkpoint, load_checkpoint
from trimtab.tune.search.lease import Lease

PLAN = "population-plan.json"
_KEPT = 4
"""Intervals whose checkpoints are kept for each member; older ones only while a decision waits for them."""


class Members:
    """Where the members of a population stand, as one worker sees it.

    Args:
        home: the population's folder.
        count: members.
        intervals: of each.
        synchronous: whether no member begins an interval before all have finished the one before.
    """

    def __init__(self, home: Path, count: int, intervals: int, *, synchronous: bool) -> None:
        self.home = home
        self.count = count
        self.intervals = intervals
        self.synchronous = synchronous
        self._records: list[list[dict[str, Any]]] = [[] for _ in range(count)]

    def refresh(self) -> None:
        """Read the records that are new."""
        for member, known in enumerate(self._records):
            while len(known) < self.intervals and (record := read_json(self._path(member, len(known)))) is not None:
                known.append(record)

    def records(self, member: int) -> list[dict[str, Any]]:
        """Return a member's records, by interval, as of the last `refresh`."""
        return self._records[member]

    def done(self) -> int:
        """Return how many intervals of all members are finished."""
        return sum(map(len, self._records))

    def finished(self) -> bool:
        """Return whether all intervals are."""
        return self.done() == self.count * self.intervals

    def open(self) -> list[tuple[int, int]]:
        """Return the (member, interval) that may be begun, those that are furthest behind first."""
        behind = min(map(len, self._records))
        waiting = [(len(known), member) for member, known in enumerate(self._records) if len(known) < self.intervals]
        return [(member, at) for at, member in sorted(waiting) if not self.synchronous or at == behind]

    def claim(self, member: int, interval: int, lease: Lease) -> bool:
        """Try to take an interval; False if a living worker has it, or it is finished by now."""
        claims = self._claims(member, interval)
        number = 0
        if claims:
            number = max(claims)
            holder = read_json(claims[number])
            if holder is not None and lease.lives(str(holder["worker"])):
                return False
            number += 1
        if not _once(self.home / "claims" / f"{member:03d}-{interval:05d}.{number}", {"worker": lease.worker}):
            return False
        if self._path(member, interval).exists():  # finished between our look and our claim
            self.release(member, interval)
            return False
        return True

    def release(self, member: int, interval: int) -> None:
        """Clear the claims on a finished interval."""
        for path in self._claims(member, interval).values():
            with contextlib.suppress(OSError):
                path.unlink()

    def _claims(self, member: int, interval: int) -> dict[int, Path]:
        paths = (self.home / "claims").glob(f"{member:03d}-{interval:05d}.*")
        return {int(path.suffix[1:]): path for path in paths}

    def decision(self, member: int, interval: int) -> dict[str, Any] | None:
        """Return where an interval starts from, if that is decided."""
        return read_json(self._path(member, interval, ".decision"))

    def decide(self, member: int, interval: int, decision: Mapping[str, Any]) -> dict[str, Any]:
        """Write a decision down unless there is one, and return the one that holds."""
        _once(self._path(member, interval, ".decision"), decision)
        found = self.decision(member, interval)
        if found is None:
            raise RecordError(f"{self._path(member, interval, '.decision')} cannot be read: remove it and run again.")
        return found

    def checkpoint_folder(self, member: int, interval: int, worker: str) -> Path:
        """Return where a worker saves the state after an interval: a place of its own."""
        return self._path(member, interval).with_name(f"{interval:05d}-{worker}")

    def state(self, member: int, interval: int) -> dict[str, Any] | None:
        """Return the state after a finished interval, or None if its checkpoint is gone."""
        record = read_json(self._path(member, interval)) or {}
        place = latest_checkpoint(self.home / str(record.get("checkpoint")))
        if place is None:
            return None
        try:
            return load_checkpoint(place)[1]
        except RecordError:
            if place.exists():
                raise
            return None

    def finish(self, member: int, interval: int, record: Mapping[str, Any]) -> bool:
        """Write an interval's record; False if another worker finished it first, whose record then holds."""
        first = _once(self._path(member, interval), record)
        self.release(member, interval)
        self.refresh()
        self._tidy(member)
        return first

    def _tidy(self, member: int) -> None:
        """Remove checkpoints that nobody will start from: old ones, and what killed workers left of finished ones."""
        waited = set()
        for other, known in enumerate(self._records):
            decision = self.decision(other, len(known))
            if decision is not None and decision["parent"] is not None:
                waited.add(tuple(decision["parent"]))
        known = self._records[member]
        for folder in self._path(member, 0).parent.glob("?????-*"):
            interval = int(folder.name[:5])
            if interval >= len(known) or (member, interval) in waited:
                continue
            kept = known[interval]["checkpoint"] == folder.relative_to(self.home).as_posix()
            if not kept or interval < len(known) - _KEPT:
                with contextlib.suppress(OSError):
                    # Renamed first: half a checkpoint must not look like one.
                    trash = folder.with_name(f".trash-{folder.name}")
                    folder.rename(trash)
                    shutil.rmtree(trash, ignore_errors=True)

    def _path(self, member: int, interval: int, kind: str = "") -> Path:
        return self.home / "members" / f"{member:03d}" / f"{interval:05d}{kind}.json"


def joined(home: Path, plan: Mapping[str, Any]) -> None:
    """Start a population in a folder, or join the one that is there.

    Raises:
        UsageError: if the folder holds a population with another plan.
        RecordError: if it cannot be written.
    """
    mine = json.loads(json.dumps(strict(plan)))
    if _once(home / PLAN, mine):
        return
    there = read_json(home / PLAN) or {}
    for name in {**mine, **there}:
        if there.get(name) != mine.get(name):
            raise UsageError(
                f"{home} holds a population with another plan: {name} is {there.get(name)!r} there and "
                f"{mine.get(name)!r} here. Ask for the same, or choose another folder."
            )


def _once(path: Path, data: Mapping[str, Any]) -> bool:
    """Write JSON to a path that has no file yet, whole or not at all; False if it has one."""
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _removed(partial), partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(strict(data), indent=1))
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links: two at the same instant then write the same place
                if path.exists():
                    return False
                partial.replace(path)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}.") from error
    return True


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
