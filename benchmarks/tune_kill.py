"""Kill -9 at random points of a tuning: trials that ended are neither lost nor repeated, the others run again.

Run: python benchmarks/tune_kill.py [--kills 20] [--seed 0]
Writes benchmarks/results/tune_kill.json. The bounds: no ended trial lost or run again, every trial run again with the
values it had, and, with one worker, the same trials and results as an uninterrupted tuning, bit for bit.

A child process tunes a function that takes some milliseconds and writes each of its calls into a log. It is killed at
random times until it was killed often enough, then left to finish. Which trials had ended at a kill is read from the
journal's lines here, not by Optuna.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import write

CHILD = """
import json, os, sys, time
from trimtab.tune.search.engine import tune

def say(text):
    os.write(1, (text + "\\n").encode())

def live(folder, log, trials, pause):
    def objective(trial):
        with open(log, "a") as file:
            file.write(json.dumps([trial.number, trial.values]) + "\\n")
        say("called")
        time.sleep(pause)
        x, y = trial.values["x"], trial.values["y"]
        return (x - 1) ** 2 + abs(y) + (trial.values["kind"] == "a")

    tune(objective, {"x": "-2:2", "y": "1e-3:10:log", "kind": "a,b,c"}, trials=trials, folder=folder, seed=3)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        live(*json.loads(line))
        os._exit(0)
    say(f"pid {child}")
    say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
"""
COMPLETE = 1
STATE = 6


class Nursery:
    """Starts tunings: a process that has imported everything once and forks one for each."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _read(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError("the child did not start")
        return line.strip()

    def run(self, folder: Path, trials: int, *, after: float | None = None, pause: float = 0.1) -> bool:
        """Tune; kill it that many seconds after its first trial began. Return whether it came to the end."""
        order = [str(folder / "tuning"), str(folder / "calls"), trials, pause]
        if self._process.stdin is None:
            raise RuntimeError("the child has no input")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid, called, killed = 0, False, False
        while not (line := self._read()).startswith("ended"):
            called = called or line == "called"
            pid = int(line.split()[1]) if line.startswith("pid") else pid
            if pid and called and after is not None and not killed:
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
                killed = True
        return line == "ended 0"


def ended(folder: Path) -> dict[int, float]:
    """Return the value of each trial that the journal holds as complete."""
    path = folder / "tuning" / "journal.log"
    found: dict[int, float] = {}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        entry = json.loads(line) if line.endswith(b"\n") else {}
        if entry.get("op_code") == STATE and entry.get("state") == COMPLETE:
            if entry["trial_id"] in found:
                raise RuntimeError(f"trial {entry['trial_id']} was closed twice")
            found[entry["trial_id"]] = entry["values"][0]
    return found


def calls(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the trial and the values of each call of the function, in order."""
    path = folder / "calls"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def kill_and_go_on(
    nursery: Nursery, folder: Path, trials: int, kills: int, seed: int, *, longest: float = 0.3
) -> dict[str, Any]:
    """Kill a tuning at random times, let it finish, and return what was lost, repeated or changed."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    kills_done, lost = 0, 0
    before: dict[int, float] = {}
    marks: list[tuple[int, set[int]]] = []
    while kills_done < kills and not nursery.run(folder, trials, after=generator.uniform(0.0, longest)):
        kills_done += 1
        now = ended(folder)
        lost += sum(now.get(number) != value for number, value in before.items())
        before = now
        # What is called from here on must not be one of those that have ended.
        marks.append((len(calls(folder)), set(now)))
    if not nursery.run(folder, trials):
        raise RuntimeError("the tuning did not come to its end")
    made = calls(folder)
    repeated = sum(any(number in finished for number, _ in made[place:]) for place, finished in marks)
    values: dict[int, list[dict[str, Any]]] = {}
    for number, drawn in made:
        values.setdefault(number, []).append(drawn)
    final = ended(folder)
    return {
        "kills": kills_done,
        "trials": len(final),
        "lost": lost + sum(final.get(number) != value for number, value in before.items()),
        "repeated": repeated,
        "run_again": sum(len(drawn) - 1 for drawn in values.values()),
        "changed": sum(any(other != drawn[0] for other in drawn) for drawn in values.values()),
        "results": [final[number] for number in sorted(final)],
        "numbers": sorted(final) == list(range(trials)),
    }


def uninterrupted(nursery: Nursery, folder: Path, trials: int) -> list[float]:
    """Return the results of a tuning that nobody kills."""
    folder.mkdir(parents=True, exist_ok=True)
    nursery.run(folder, trials, pause=0.0)
    final = ended(folder)
    return [final[number] for number in sorted(final)]


def main() -> None:
    """Kill, judge and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        expected = uninterrupted(nursery, Path(folder) / "whole", options.trials)
        found = kill_and_go_on(nursery, Path(folder) / "killed", options.trials, options.kills, options.seed)
    found["equal_to_uninterrupted"] = found.pop("results") == expected
    print(found)
    print(write("tune_kill", found))


if __name__ == "__main__":
    main()
