"""Kill -9 of whole commands at random points: finished jobs lost or repeated, and whether the result is the same.

Run: nice python benchmarks/kill_commands.py [--trials 20] [--only lr-range,sweep] [--fresh] [--seed 0]
Writes benchmarks/results/kill_commands.json, in place of what it said of the same commands. The bounds: nothing
finished is lost or done again, every result is equal.

A trial starts a command in a process group of its own, and kills the command and all its workers when a random number
of its jobs is finished, plus up to a fifth of a second, or so long after the start; then it starts the same command
until it ends by itself. What was finished at a kill must be there unchanged at the end, and the result, without its
times and folders, equal that of a command that was never killed.

A start of Python with torch takes seconds, so commands and their workers are forked from this process, which has all
imported: the same code from `main` on. With --fresh they are started by the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MLP = "digits-mlp"
RECORDS: dict[str, tuple[list[str], list[str], str]] = {
    "lr-range": ([MLP, "--steps=60", "--seeds=4"], ["jobs/*.json"], "lr-range.json"),
    "sweep": ([MLP, "--steps=40", "--points=4", "--lr=1e-3:1e-1"], ["jobs/*.json"], "sweep.json"),
    "pbt": (
        [MLP, "--steps=120", "--members=4", "--interval=30", "--synchronous"],
        ["members/*/?????.json"],
        "population.json",
    ),
    "tune": ([MLP, "--steps=40", "--trials=5", "--space=lr=1e-4:1e-1:log", "--sampler=random"], [], "tune.json"),
    "coord-check": ([MLP, "--widths=16,32,64", "--seeds=2"], ["jobs/*.json"], "coord-check.json"),
    "bench": (["--quick", "--tune-baselines"], ["jobs/*.json", "*/jobs/*.json"], "bench.json"),
}
"""For each command its arguments, the files that hold what is finished, and the file of its result."""

JOURNAL = "journal.log"
VOLATILE = re.compile(r"(^|_)(attempt|seconds|time|times|folder|host|pid|worker|date|created|cpu|cost|speed|out)(_|$)")
PATIENCE = 600.0
KILLS = 2

Snapshot = dict[str, tuple[int, bytes]]


class Forked:
    """A worker process forked from this one, with the part of `subprocess.Popen` that a pool uses."""

    def __init__(self, command: list[str], *, stderr: Any, **_: Any) -> None:
        to_worker, from_worker = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.setsid()
                for source, target in ((to_worker[0], 0), (from_worker[1], 1), (stderr.fileno(), 2)):
                    os.dup2(source, target)
                os.closerange(3, 1024)
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
                from trimtab.compare.worker import main

                main(command[-1])
            finally:
                os._exit(1)
        os.close(to_worker[0])
        os.close(from_worker[1])
        self.stdin, self.stdout = os.fdopen(to_worker[1], "wb"), os.fdopen(from_worker[0], "rb")
        self._code: int | None = None

    def _ended(self, options: int) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # another thread was faster
                return self._code
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end."""
        while self._ended(os.WNOHANG) is None:
            time.sleep(0.002)
        return self._code or 0


class Command:
    """One start of a command, in a process group of its own."""

    def __init__(self, arguments: list[str], log: Path, *, fresh: bool) -> None:
        with log.open("ab") as stream:
            if fresh:
                command = [sys.executable, "-m", "trimtab", *arguments]
                self.pid = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True).pid
                return
            self.pid = os.fork()
            if not self.pid:
                with contextlib.suppress(BaseException):
                    os.setsid()
                    os.dup2(stream.fileno(), 1)
                    os.dup2(stream.fileno(), 2)
                    sys.stdout, sys.stderr = (os.fdopen(n, "w") for n in (1, 2))
                    from trimtab.cli import main
                    from trimtab.compare import pool

                    pool.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)  # type: ignore[assignment]
                    code = main(arguments)
                    sys.stdout.flush()
                    os._exit(code)
                os._exit(99)

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> int:
        """Kill it and all that it started; return how many processes that were."""
        family = [self.pid, *descendants(self.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return len(family)


def descendants(root: int) -> list[int]:
    """Return the processes that a process of ours started, and theirs."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def finished(folder: Path, patterns: list[str]) -> Snapshot:
    """Return what is finished in a folder: files with their times, and the lines of a journal that end a trial."""
    found = {}
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with contextlib.suppress(OSError):
            found[path.relative_to(folder).as_posix()] = (path.stat().st_mtime_ns, path.read_bytes())
    for number, line in enumerate(endings(folder)):
        found[f"{JOURNAL} {number}"] = (0, line)
    return found


def endings(folder: Path) -> list[bytes]:
    """Return the journal's lines in which a trial's ending was written, in order."""
    journal = folder / JOURNAL
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [line for line in lines if b'"ending"' in line]


def repeated_endings(folder: Path) -> int:
    """Return how many endings were written for a trial that had one."""
    trials = [json.loads(line).get("trial_id") for line in endings(folder)]
    return len(trials) - len(set(trials))


def comparable(value: Any) -> Any:
    """Return a result without its times, folders, names of processes and counts of attempts."""
    if isinstance(value, dict):
        return {key: comparable(entry) for key, entry in value.items() if not VOLATILE.search(key)}
    return [comparable(entry) for entry in value] if isinstance(value, list) else value


def result_of(folder: Path, name: str) -> Any:
    """Return a command's result, or None if it has none."""
    with contextlib.suppress(OSError, ValueError):
        return comparable(json.loads((folder / name).read_text()))
    return None


def to_the_end(command: Command, until: Callable[[float], bool]) -> tuple[int | None, int]:
    """Wait for a command or for the moment to kill it; return its exit status (None if killed) and processes killed."""
    began = time.monotonic()
    while (code := command.poll()) is None:
        if until(time.monotonic() - began):
            return None, command.kill()
        if time.monotonic() - began > PATIENCE:
            command.kill()
            raise SystemExit("a command did not end")
        time.sleep(0.002)
    return code, 0


def one_trial(name: str, home: Path, choose: random.Random, reference: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Kill a command up to `KILLS` times, let it end, and judge what it left."""
    arguments, patterns, result = RECORDS[name]
    folder, log = home / "out", home / "log.txt"
    line = [name, *arguments, f"--out={folder}"]
    kept: list[Snapshot] = []
    killed = []
    for _ in range(KILLS):
        target, wait = choose.randrange(reference["finished"] + 1), choose.uniform(0, 0.2)
        late = choose.uniform(0, 1.5 * reference["wall_seconds"])
        due: list[float] = []

        def until(
            seconds: float, target: int = target, wait: float = wait, late: float = late, due: list[float] = due
        ) -> bool:
            if not due and len(finished(folder, patterns)) >= max(1, target):
                due.append(seconds + wait)
            return seconds >= (due[0] if due else late if not target else PATIENCE)

        code, processes = to_the_end(Command(line, log, fresh=fresh), until)
        if code is not None:
            break
        kept.append(finished(folder, patterns))
        killed.append({"finished": len(kept[-1]), "processes": processes})
    code, _ = to_the_end(Command(line, log, fresh=fresh), lambda seconds: False)
    after = finished(folder, patterns)
    lost = {key for snapshot in kept for key in snapshot if key not in after}
    again = {key for snapshot in kept for key, value in snapshot.items() if key in after and after[key] != value}
    return {
        "kills": killed,
        "exit_code": code,
        "lost": len(lost),
        "repeated": len(again) + repeated_endings(folder),
        "finished": len(after),
        "equal": result_of(folder, result) == reference["result"],
        "log": log.read_text()[-400:] if code != reference["exit_code"] else "",
    }


def measure(name: str, trials: int, seed: int, fresh: bool) -> dict[str, Any]:
    """Run a command once in peace, then kill and restart it in `trials` folders."""
    arguments, patterns, result = RECORDS[name]
    began = time.monotonic()
    with cleared() as home:
        code, _ = to_the_end(
            Command([name, *arguments, f"--out={home / 'out'}"], home / "log.txt", fresh=fresh), lambda seconds: False
        )
        found = result_of(home / "out", result)
        count = len(finished(home / "out", patterns))
        wall = time.monotonic() - began
        text = (home / "log.txt").read_text()
        if "No such command" in text:
            return {"skipped": "there is no such command yet"}
        if found is None or not count:
            return {"skipped": f"exit code {code}, {count} finished, no {result}: {' '.join(text[-300:].split())}"}
    reference = {"result": found, "finished": count, "wall_seconds": wall, "exit_code": code}
    choose = random.Random(seed)
    each = []
    for _ in range(trials):
        with cleared() as home:
            each.append(one_trial(name, home, choose, reference, fresh))
    return {
        "command": " ".join(["trimtab", name, *arguments]),
        "trials": trials,
        "kills": sum(len(entry["kills"]) for entry in each),
        "kills_with_finished_jobs": sum(kill["finished"] > 0 for entry in each for kill in entry["kills"]),
        "finished_at_kills": sum(kill["finished"] for entry in each for kill in entry["kills"]),
        "lost": sum(entry["lost"] for entry in each),
        "repeated": sum(entry["repeated"] for entry in each),
        "results_equal": sum(entry["equal"] for entry in each),
        "exit_codes_equal": sum(entry["exit_code"] == code for entry in each),
        "jobs": count,
        "reference_wall_seconds": wall,
        "each": each,
    }


@contextlib.contextmanager
def cleared() -> Iterator[Path]:
    """Give a folder that is gone afterwards."""
    home = Path(tempfile.mkdtemp())
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def import_all() -> None:
    """Import what the commands import, so that forks need not."""
    import importlib

    from trimtab.catalogue import methods
    from trimtab.workloads import workload

    methods()
    workload(MLP).prepare()
    for module in ("optuna", "scipy.stats", "trimtab.cli", "trimtab.report", "trimtab.watch", "plotly.offline"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def main() -> int:
    """Measure, print and write; 1 if a bound does not hold."""
    from _common import RESULTS, one_thread, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(RECORDS))
    parser.add_argument("--fresh", action="store_true", help="Start the interpreter anew.")
    parser.add_argument("--name", default="kill_commands", help="Name of the result file.")
    arguments = parser.parse_args()
    one_thread()
    if not arguments.fresh:
        import_all()
    good = True
    for name in arguments.only.split(","):
        found = measure(name, arguments.trials, arguments.seed, arguments.fresh)
        found["started"] = "by the interpreter" if arguments.fresh else "by fork"
        print(name, {key: value for key, value in found.items() if key != "each"}, flush=True)
        if "skipped" not in found:
            bounds = ("results_equal", "exit_codes_equal")
            good &= not found["lost"] and not found["repeated"]
            good &= all(found[bound] == arguments.trials for bound in bounds)
        path = RESULTS / f"{arguments.name}.json"
        known = json.loads(path.read_text())["result"] if path.exists() else {}
        print(write(arguments.name, {**known, name: found}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
