"""What a script says in a trial of `trimtab tune`: which values it wants, and how it goes.

Outside a tuning the same script runs as it is: `suggest` returns its default, `report` and `result` do nothing.

Under `trimtab tune train.py` the environment variable `TRIMTAB_TRIAL` names the trial's folder. The script appends its
messages to `messages.jsonl` there, one line of JSON each, and reads the answers from `answers.jsonl`; every process of
a script with several gets the same values.

Example:
    >>> import trimtab.trial
    >>> trimtab.trial.suggest("lr", 1e-4, 1e-1, log=True)  # outside a tuning: the middle
    0.003162
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

from trimtab.errors import RunFailedError, UsageError

__all__ = ["active", "folder", "report", "result", "suggest"]

Value: TypeAlias = float | int | str | bool

_VARIABLE = "TRIMTAB_TRIAL"
_PAUSE = 0.002
_LONGEST_PAUSE = 0.05
_LOCK = threading.Lock()


def active() -> bool:
    """Return whether the script runs as a trial of `trimtab tune`.

    Example:
        >>> active()
        False
    """
    return bool(os.environ.get(_VARIABLE))


def folder() -> Path | None:
    """Return the trial's folder, None outside a tuning.

    A `trimtab.Watch(model, optimizer, to=...)` that records there is examined by the doctor at the end.

    Example:
        >>> folder() is None
        True
    """
    return Path(os.environ[_VARIABLE]) if active() else None


def suggest(
    name: str,
    low: float | Sequence[Value],
    high: float | None = None,
    *,
    default: Value | None = None,
    log: bool = False,
    integer: bool = False,
    step: float = 0.0,
) -> Any:
    """Return the trial's value of a hyper-parameter.

    A range that `trimtab tune --space` gives for the name counts before the one given here.

    Args:
        name: of the hyper-parameter.
        low: the lowest value, or a list of at least two choices.
        high: the highest value, above `low`.
        default: what is returned outside a tuning; the middle of the range (in ratio, with `log`) or the first choice
            if it is left out.
        log: whether equal ratios are equally likely, not equal differences; `low` must then be above 0.
        integer: whether only whole numbers are drawn.
        step: the distance between values; 0 for none.

    Returns:
        The value: an int with `integer`, a float of four significant digits without `step`, or a choice.

    Raises:
        UsageError: if the range or the choices are not usable.
        RunFailedError: if the worker that runs the trial is gone.

    Example:
        >>> suggest("layers", 1, 7, integer=True), suggest("optimizer", ["adamw", "lion"], default="lion")
        (4, 'lion')
    """
    if not active():
        return _middle(name, low, high, log=log, integer=integer, step=step) if default is None else default
    chosen = list(low) if isinstance(low, Sequence) and not isinstance(low, str) else low
    ask = {"low": chosen, "high": high, "log": log, "integer": integer, "step": step}
    return _ask("suggest", {"name": name, **ask})["value"]


def report(value: float, step: int) -> None:
    """Report the metric on the way; a trial that is not worth going on ends here, by `SystemExit`.

    Each call waits for an answer, some milliseconds: report at evaluations, or every so many steps.

    Args:
        value: of the metric that is tuned; NaN ends the trial.
        step: whole, rising.

    Raises:
        SystemExit: if the trial is lost (its loss diverges or is not finite) or, with `--median`, behind others.
        RunFailedError: if the worker that runs the trial is gone.

    Example:
        >>> report(0.5, step=10)  # outside a tuning: nothing
    """
    if not active():
        return
    answer = _ask("report", {"value": float(value), "step": int(step)})
    if answer.get("stop"):
        raise SystemExit(0)


def result(value: float, **metrics: float) -> None:
    """Give the trial's result: the metric that is tuned, at the end of the run. The last call counts.

    Args:
        value: of the metric.
        **metrics: further numbers to be kept with it.

    Raises:
        RunFailedError: if the worker that runs the trial is gone.

    Example:
        >>> result(0.25, accuracy=0.9)  # outside a tuning: nothing
    """
    if active():
        _ask("result", {"value": float(value), "metrics": {name: float(number) for name, number in metrics.items()}})


def _middle(name: str, low: Any, high: Any, **options: Any) -> Value:
    from trimtab.tune.search.space import dimension_of  # late: a trial of a tuning does without it

    return dimension_of(name, low, high, **options).middle


def _ask(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Send a message and wait for its answer."""
    home = Path(os.environ[_VARIABLE])
    number = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    line = json.dumps({"id": number, "kind": kind, **{key: _plain(value) for key, value in data.items()}})
    place, pause = _READ.get(home, 0), _PAUSE
    with _LOCK, (home / "messages.jsonl").open("ab") as file:
        file.write(line.encode() + b"\n")
    while True:
        place, answers = _answers(home / "answers.jsonl", place)
        for answer in answers:
            if answer.get("id") == number:
                _READ[home] = place
                if "error" in answer:
                    raise UsageError(answer["error"])
                return answer
        if not answers:
            if not _alive(home):
                raise RunFailedError("the worker that runs this trial is gone: run trimtab tune again.")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)


_READ: dict[Path, int] = {}
"""How far the answers of a trial were read."""


def _answers(path: Path, place: int) -> tuple[int, list[dict[str, Any]]]:
    """Return the whole lines behind a place in the file, and the place behind them."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            text = file.read()
    except FileNotFoundError:
        return place, []
    whole = text[: text.rfind(b"\n") + 1]
    return place + len(whole), [json.loads(line) for line in whole.splitlines()]


def _alive(home: Path) -> bool:
    try:
        os.kill(int((home / "worker.pid").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _plain(value: Any) -> Any:
    """Return a value as strict JSON has it: numbers of NumPy become Python's, one that is not finite its word."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, (bool, Integral)):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
