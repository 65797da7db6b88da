"""Kill -9 at random points of a training run: acknowledged rows lost, and whether resuming is bit-exact.

Run: python benchmarks/kill.py [--points 50] [--seed 0]
Writes benchmarks/results/kill.json. The bounds: no acknowledged row lost, every resumed run bit-equal.

A child process trains `digits-mlp` with the default watch, commits the record at every row, writes a checkpoint every
five steps, and reports each acknowledgement through a pipe. It is killed when a random number of rows is acknowledged,
plus up to three milliseconds. What must hold is judged against an uninterrupted run, reading the file by SQLite alone.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.record import latest_checkpoint, load_checkpoint
from trimtab.workloads import train, workload

STEPS = 60
CHECKPOINT_EVERY = 5
CHILD = """
import os, sys
import torch
torch.set_num_threads(1)
from trimtab.record import Recorder
from trimtab.workloads import train, workload

make, flush = Recorder.__init__, Recorder.flush

def eager(self, *args, **options):
    make(self, *args, **{**options, "flush_every": 0.0})

def acknowledged(self):
    count = flush(self)
    os.write(1, b"%d\\n" % count)
    return count

Recorder.__init__, Recorder.flush = eager, acknowledged
job = workload("digits-mlp")
train(job, job.defaults.replace(steps=int(sys.argv[2])), out=sys.argv[1], checkpoint_every=int(sys.argv[3]))
"""

Rows = dict[tuple[str, str, int], bytes]


def rows(folder: Path) -> tuple[Rows, int]:
    """Return every sample, and how many rows there are with the events, read by SQLite alone."""
    db = sqlite3.connect(folder / "rank0.sqlite")
    try:
        query = "SELECT name, labels, step, value FROM sample JOIN signal ON signal.id = sample.signal"
        samples = {(name, labels, step): value for name, labels, step, value in db.execute(query)}
        return samples, len(samples) + db.execute("SELECT count(*) FROM event").fetchone()[0]
    finally:
        db.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's newest checkpoint."""
    newest = latest_checkpoint(folder)
    if newest is None:
        raise SystemExit(f"{folder} has no checkpoint")
    return load_checkpoint(newest)[1]["model"]


def uninterrupted(folder: Path) -> tuple[Rows, dict[str, torch.Tensor], int]:
    """Train without interruption: every sample, the final weights, and the number of rows."""
    job = workload("digits-mlp")
    train(job, job.defaults.replace(steps=STEPS), out=folder, checkpoint_every=CHECKPOINT_EVERY)
    samples, count = rows(folder)
    return samples, weights(folder), count


def kill_and_resume(
    folder: Path, target: int, delay: float, expected: tuple[Rows, dict[str, torch.Tensor], int]
) -> dict[str, Any]:
    """Kill a run after `target` acknowledged rows and `delay` seconds; judge its record, and the end once resumed."""
    command = [sys.executable, "-c", CHILD, str(folder), str(STEPS), str(CHECKPOINT_EVERY)]
    acknowledged = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        if child.stdout is None:
            raise SystemExit("the child has no pipe")
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged >= target:
                break
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        # What it still reported before it died counts too.
        for line in child.stdout:
            if line.endswith(b"\n"):
                acknowledged = int(line)
    samples, weight, _ = expected
    found, count = rows(folder)
    wrong = sum(samples.get(key) != value for key, value in found.items())
    job = workload("digits-mlp")
    newest = latest_checkpoint(folder)
    train(
        job,
        job.defaults.replace(steps=STEPS),
        out=folder,
        checkpoint_every=CHECKPOINT_EVERY,
        resume=True,
    )
    after, final = rows(folder)[0], weights(folder)
    return {
        "killed": child.returncode == -signal.SIGKILL,
        "acknowledged_rows": acknowledged,
        "rows_found": count,
        "rows_lost": max(0, acknowledged - count),
        "rows_wrong": wrong,
        "resumed_from": None if newest is None else newest.name,
        "record_equal": after == samples,
        "weights_equal": list(final) == list(weight) and all(torch.equal(final[key], weight[key]) for key in weight),
    }


def measure(points: int, seed: int) -> list[dict[str, Any]]:
    """Kill and resume at random points, one after the other."""
    choose = random.Random(seed)
    found = []
    with tempfile.TemporaryDirectory() as home:
        expected = uninterrupted(Path(home) / "uninterrupted")
        for point in range(points):
            folder = Path(home) / f"killed-{point}"
            target, delay = choose.randrange(1, expected[2] - 30), choose.uniform(0, 0.003)
            found.append(kill_and_resume(folder, target, delay, expected))
            shutil.rmtree(folder)
    return found


def main() -> int:
    """Measure, print and write; 1 if a bound does not hold."""
    from _common import one_thread, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    one_thread()
    found = measure(arguments.points, arguments.seed)
    result = {
        "points": len(found),
        "killed": sum(entry["killed"] for entry in found),
        "acknowledged_rows": sum(entry["acknowledged_rows"] for entry in found),
        "acknowledged_rows_lost": sum(entry["rows_lost"] for entry in found),
        "rows_wrong": sum(entry["rows_wrong"] for entry in found),
        "records_equal_after_resume": sum(entry["record_equal"] for entry in found),
        "weights_equal_after_resume": sum(entry["weights_equal"] for entry in found),
        "each": found,
    }
    for name, value in result.items():
        if name != "each":
            print(f"{name:28s} {value}")
    print(write("kill", result))
    good = not result["acknowledged_rows_lost"] and not result["rows_wrong"]
    return 0 if good and all(entry["record_equal"] and entry["weights_equal"] for entry in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
