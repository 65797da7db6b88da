"""Worker processes: started afresh, spoken to in JSON lines over pipes, replaced when they die, gone when we are.

Not `multiprocessing`: it would import the caller's script again, needs pickle, and its workers outlive a killed parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import RecordError, RunFailedError, UsageError

_ATTEMPTS = 2
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from trimtab.compare.worker import main; main(sys.argv[2])"
)


class Listener(Protocol):
    """What the pool tells of its jobs."""

    def moved(self, key: str, step: int, loss: float) -> None:
        """A job made a step."""

    def ended(self, key: str) -> None:
        """A job finished."""

    def note(self, key: str, text: str) -> None:
        """Something out of the ordinary happened to a job."""


class Pool:
    """Worker processes that run orders; leaving the context ends them.

    Args:
        folder: the comparison's folder; workers write results and logs into its `jobs/`.
        size: how many workers.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self._inbox: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def run(self, orders: Sequence[Mapping[str, Any]], listener: Listener) -> dict[str, str]:
        """Run the orders and return why each failed one failed.

        Raises:
            UsageError: if a job was asked for something wrong.
            RunFailedError: if workers do not even start.
            RecordError: if a log cannot be written, or no process can be started.
        """
        waiting = deque(orders)
        attempts: dict[str, int] = {}
        failures: dict[str, str] = {}
        remaining = len(orders)
        for _ in range(self._size):
            self._start()
        while remaining:
            worker, message = self._inbox.get()
            kind, key = message["type"], str(message.get("key", ""))
            if kind == "moved":
                listener.moved(key, int(message["step"]), float(message["loss"]))
                continue
            if kind == "died":
                self._workers.remove(worker)
                worker.end()
                lost = worker.order
                if lost is not None:
                    key, reason = str(lost["key"]), worker.cause_of_death()
                    attempts[key] = attempts.get(key, 0) + 1
                    again = attempts[key] < _ATTEMPTS
                    listener.note(key, f"{reason}; {'trying once more' if again else 'giving up'}")
                    if again:
                        waiting.append(lost)
                    else:
                        failures[key] = f"{reason}, twice."
                        remaining -= 1
                elif not worker.was_ready:
                    raise RunFailedError(f"a worker process did not start: {worker.cause_of_death()}.")
                if waiting:
                    self._start()
                continue
            if kind == "done":
                listener.ended(key)
                remaining -= 1
            elif kind == "failed":
                if message["usage"]:
                    raise UsageError(message["message"])
                failures[key] = message["message"]
                listener.note(key, message["message"])
                remaining -= 1
            worker.was_ready, worker.order = True, None
            if waiting:
                worker.give(waiting.popleft())
        return failures

    def _start(self) -> None:
        taken = {worker.number for worker in self._workers}
        number = next(index for index in range(self._size) if index not in taken)
        self._workers.append(_Worker(number, self._folder, self._inbox))


class _Worker:
    """One process, and the thread that reads what it says."""

    def __init__(self, number: int, folder: Path, inbox: queue.Queue[tuple[_Worker, dict[str, Any]]]) -> None:
        self.number = number
        self.order: Mapping[str, Any] | None = None
        self.was_ready = False
        self.log = folder / "jobs" / f"worker-{number}.log"
        paths = [entry or os.getcwd() for entry in sys.path]
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, json.dumps(paths), str(folder.resolve())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                    # Its own session: the Ctrl-C of a terminal reaches this process alone, which then ends the workers.
                    start_new_session=True,
                )
        except OSError as error:
            raise RecordError(f"cannot start a worker for {folder}: {error.strerror or error}.") from error
        self._listener = threading.Thread(target=self._listen, args=(inbox,), daemon=True)
        self._listener.start()

    def _listen(self, inbox: queue.Queue[tuple[_Worker, dict[str, Any]]]) -> None:
        stdout = self._process.stdout
        if stdout is not None:
            for line in stdout:
                if line.endswith(b"\n"):  # a line cut short by a kill is no message
                    inbox.put((self, json.loads(line)))
        self._process.wait()
        inbox.put((self, {"type": "died"}))

    def give(self, order: Mapping[str, Any]) -> None:
        """Send an order; if the worker is dead already, its `died` message tells so."""
        self.order = order
        stdin = self._process.stdin
        with contextlib.suppress(OSError):
            if stdin is not None:
                stdin.write(json.dumps(order).encode() + b"\n")
                stdin.flush()

    def cause_of_death(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"its worker exited with code {code} (see {self.log})"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its worker was killed by {name}{hint}"

    def end(self) -> None:
        """Kill the process if it lives, with what it started, and close its pipes; harmless when repeated."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be sent finds no reader
                    pipe.close()
