"""Trials that run a user's script: a process for each, spoken to through two files in the trial's folder."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trimtab.errors import RecordError, UsageError
from trimtab.tune.search.desk import Ticket
from trimtab.tune.search.ending import failed
from trimtab.tune.search.function_trial import concluded, stopped
from trimtab.tune.search.journal import kernel
from trimtab.tune.search.ongoing import Ongoing, Stopped, Tell
from trimtab.tune.search.space import Dimension, dimension_of
from trimtab.tune.search.verdict import findings_in, record_losses

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")
_GIVEN = ("folder", "trial")
_PAUSE = 0.005
_PATIENCE = 10.0
"""Seconds that a script may take to end after it was told to."""

_BOOT = (
    "-ISc",
    "import os, sys\n"
    "if sys.platform == 'linux':\n"
    "    import ctypes, signal\n"
    "    ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "    if os.getppid() != int(sys.argv[1]):\n"
    "        os._exit(1)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n",
)
"""What starts a script so that it ends with its worker, however that ends, where the system can see to it."""


def script_plan(
    script: str | Path, arguments: Sequence[str], space: Mapping[str, Dimension], *, pattern: str
) -> dict[str, Any]:
    """Return what trials of a script need to know.

    Args:
        script: a file of Python.
        arguments: its command line; `{NAME}` stands for a value of the space, `{folder}` for the trial's folder and
            `{trial}` for its number.
        space: dimensions by name.
        pattern: a regular expression whose group, in the last line of the output that it is found in, is the metric;
            empty if the script gives it otherwise.

    Raises:
        UsageError: if there is no such file, a place in the arguments has no name of the space, or the pattern is none.
    """
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {str(script)!r}: give a file, or a workload of 'trimtab workloads'.")
    for name in (found for argument in arguments for found in _PLACE.findall(argument)):
        if name not in space and name not in _GIVEN:
            valid = ", ".join([*space, *_GIVEN])
            raise UsageError(f"{{{name}}} stands for nothing in the space; valid: {valid}.")
    if pattern:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise UsageError(f"the metric's pattern {pattern!r} is no regular expression: {error}.") from None
        if groups != 1:
            raise UsageError(f"the metric's pattern {pattern!r} should have one group, such as 'loss=([0-9.e+-]+)'.")
    return {"kind": "script", "script": str(path.resolve()), "arguments": list(arguments), "pattern": pattern}


def run_script_trial(plan: Mapping[str, Any], ticket: Ticket, folder: Path, tell: Tell) -> dict[str, Any]:
    """Run the script once and return how it ended.

    Its output goes to `output.log` in the trial's folder.

    Args:
        plan: the tuning's.
        ticket: the trial.
        folder: of the trial.
        tell: hears of its reports.

    Raises:
        RecordError: if the folder cannot be written.
    """
    trial = Ongoing(plan, ticket, folder, tell)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "worker.pid").write_text(str(os.getpid()), encoding="utf-8")
        (folder / "trial.json").write_text(
            json.dumps({"trial": ticket.number, "values": trial.values}) + "\n", encoding="utf-8"
        )
        with _Process(plan, trial, folder) as process:
            stop = process.serve()
    except OSError as error:
        raise RecordError(f"cannot run {plan['script']} in {folder}: {error.strerror or error}.") from error
    if stop is not None:
        return stopped(trial, stop)
    output = (folder / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()
    if process.code:
        record_losses(folder, trial.losses)
        last = next((line for line in reversed(output) if line.strip()), "it printed nothing")
        return failed(f"{_death(process.code)}: {last}", findings_in(folder), values=trial.values)
    value = process.result
    if value is None:
        value = printed(output, plan["metric"], plan["pattern"])
    if value is None:
        value = trial.latest
    unused = [name for name in plan["space"] if name not in trial.asked and name not in _used(plan)]
    if unused:
        word = f"{unused[0]} of the space has no effect: write {{{unused[0]}}} into the arguments, or call "
        return failed(f"{word}trimtab.trial.suggest({unused[0]!r}, ...)", values=trial.values)
    if value is None:
        text = f"it gave no {plan['metric']}: call trimtab.trial.result, print it as JSON, or give --metric-pattern"
        return failed(text, findings_in(folder), values=trial.values)
    return {**concluded(plan, trial, value), "metrics": process.metrics}


def _used(plan: Mapping[str, Any]) -> set[str]:
    return {name for argument in plan["arguments"] for name in _PLACE.findall(argument)}


def printed(lines: Sequence[str], metric: str, pattern: str = "") -> float | None:
    r"""Return the metric that a script printed last, or None.

    Args:
        lines: of its output.
        metric: its name: the last line that is a JSON object with that key and a number counts.
        pattern: a regular expression with one group, which counts instead.

    Example:
        >>> printed(["epoch 1", '{"loss": 0.25}', "done"], "loss")
        0.25
        >>> printed(["loss=0.5", "loss=nan"], "loss", r"loss=([\w.]+)")
        nan
    """
    for line in reversed(lines):
        if pattern:
            if found := re.search(pattern, line):
                with suppress(ValueError, TypeError):
                    return float(found.group(1))
        elif line.strip().startswith("{"):
            with suppress(ValueError, TypeError, KeyError):
                return float(json.loads(line)[metric])
    return None


def end_leftover(folder: Path) -> None:
    """End the script of a dead worker, where it still runs on this system."""
    with suppress(OSError, ValueError, KeyError):
        data = json.loads((folder / "process.json").read_text(encoding="utf-8"))
        if _birth(data["pid"]) == data["birth"]:
            os.kill(data["pid"], signal.SIGKILL)


def _death(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _birth(pid: int) -> str:
    """Return when a process of this system began, which tells it from a later one of the same number."""
    return kernel() + Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class _Process:
    """A script that runs."""

    def __init__(self, plan: Mapping[str, Any], trial: Ongoing, folder: Path) -> None:
        self.result: float | None = None
        self.metrics: dict[str, float] = {}
        self._trial = trial
        self._folder = folder
        filled = {**trial.values, "folder": str(folder.resolve()), "trial": trial.number}
        arguments = [_PLACE.sub(lambda found: str(filled[found[1]]), text) for text in plan["arguments"]]
        (folder / "messages.jsonl").touch()
        self._messages: IO[bytes] = (folder / "messages.jsonl").open("rb")
        self._answers: IO[bytes] = (folder / "answers.jsonl").open("ab", buffering=0)
        with (folder / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *_BOOT, str(os.getpid()), plan["script"], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TRIMTAB_TRIAL": str(folder.resolve()), "PYTHONUNBUFFERED": "1"},
            )
        with suppress(OSError):
            identity = {"pid": self._process.pid, "birth": _birth(self._process.pid)}
            (folder / "process.json").write_text(json.dumps(identity), encoding="utf-8")
        self._rest = b""

    @property
    def code(self) -> int:
        """The exit code."""
        return self._process.wait()

    def serve(self) -> Stopped | None:
        """Answer until the script has ended; return why it was stopped, if it was."""
        stop: Stopped | None = None
        deadline, end = math.inf, self._process.terminate
        while True:
            ended = self._process.poll() is not None
            for message in self._received():
                if stop is None:
                    stop = self._answer(message)
                    if stop is not None:
                        deadline = time.monotonic() + _PATIENCE
                else:
                    self._send({"id": message["id"], "stop": str(stop)})
            if ended:
                return stop
            if time.monotonic() > deadline:
                end()
                deadline, end = time.monotonic() + _PATIENCE, self._process.kill
            time.sleep(_PAUSE)

    def _received(self) -> list[dict[str, Any]]:
        whole, newline, self._rest = (self._rest + self._messages.read()).rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()] if newline else []

    def _answer(self, message: Mapping[str, Any]) -> Stopped | None:
        answer: dict[str, Any] = {"id": message["id"]}
        stop = None
        try:
            if message["kind"] == "suggest":
                options = {key: message[key] for key in ("log", "integer", "step")}
                dimension = dimension_of(message["name"], message["low"], message["high"], **options)
                answer["value"] = self._trial.draw(message["name"], dimension)
            elif message["kind"] == "report":
                self._trial.report(float(message["value"]), message["step"])
            else:
                self.result = float(message["value"])
                self.metrics = {name: float(number) for name, number in message["metrics"].items()}
        except UsageError as error:
            answer["error"] = str(error)
        except Stopped as error:
            stop = error
            answer["stop"] = str(error)
        self._send(answer)
        return stop

    def _send(self, answer: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(answer).encode() + b"\n")

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._messages.close()
        self._answers.close()
