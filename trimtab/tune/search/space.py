"""What may be tried: ranges and choices by name, as Python objects, as text of a command line, and as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from trimtab.errors import UsageError

Value: TypeAlias = float | int | str | bool
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_DIGITS = 4
_INNER = 0.00123
_GRAMMAR = "write NAME=LOW:HIGH with :log, :int or :step=SIZE behind it, or NAME=A,B,C"


class Suggests(Protocol):
    """What draws values: a trial of Optuna, or one that is not in the journal yet."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """Draw a number."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Draw a whole number."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draw one of several values."""
        ...


__all__ = ["Choice", "Range", "parse_space"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Values of a range without a step are rounded to four significant digits, so that what a table shows, or an arm
    says, is exactly what ran.

    Args:
        low: the lowest value.
        high: the highest value, above `low`.
        log: whether equal ratios are equally likely, not equal differences; `low` must then be above 0.
        integer: whether only whole numbers are drawn.
        step: the distance between values; 0 for none (1 for whole numbers). Not together with `log`.

    Raises:
        UsageError: if the range is empty or breaks one of these rules.

    Example:
        >>> Range(1e-4, 1e-1, log=True).middle
        0.003162
        >>> Range(16, 128, integer=True).middle
        72
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    step: float = 0.0

    def __post_init__(self) -> None:
        low, high, step = self.low, self.high, self.step
        for what, value in (("low", low), ("high", high), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"{what} of a range should be a finite number, got {value!r}.")
            if self.integer and int(value) != value:
                raise UsageError(f"{what} of a range of whole numbers should be one, got {value!r}.")
        if low >= high:
            raise UsageError(f"low of a range should be below high, got {low!r} and {high!r}.")
        if self.log and low <= 0:
            raise UsageError(f"low of a logarithmic range should be above 0, got {low!r}.")
        if self.log and step:
            raise UsageError("a logarithmic range takes no step: leave one of the two out.")
        if step < 0 or step > high - low:
            raise UsageError(f"step of a range should be above 0 and at most high - low, got {step!r}.")
        if self.integer:
            for what, value in (("low", low), ("high", high), ("step", step)):
                object.__setattr__(self, what, int(value))

    @property
    def middle(self) -> float:
        """The value in the middle, in ratio where the range is logarithmic."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step:
            middle = self.low + math.floor((middle - self.low) / self.step) * self.step
        return self.rounded(middle)

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values at which a range is tried out before anything is trained: both ends, and one between them."""
        # One between two whole numbers is among them: ends that are whole say nothing on those that are not.
        inner = self.low + (self.step or _INNER * (self.high - self.low))
        return (self.low, self.high) if self.integer else (self.low, self.rounded(inner), self.high)

    def rounded(self, value: float) -> float:
        """Return a drawn value as it is used."""
        if self.integer:
            return round(value)
        return value if self.step else min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def suggest(self, trial: Suggests, name: str) -> Value:
        """Draw a value for a trial; the second call for a name returns the same."""
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        return self.rounded(trial.suggest_float(name, self.low, self.high, step=self.step or None, log=self.log))

    def to_json(self) -> dict[str, Any]:
        """Return the range as JSON data."""
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer, "step": self.step}

    def __str__(self) -> str:
        more = [":log"] * self.log + [":int"] * self.integer + [f":step={self.step:g}"] * bool(self.step)
        return f"{self.low:g}:{self.high:g}{''.join(more)}"


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Args:
        values: at least two different texts, numbers or booleans.

    Raises:
        UsageError: if there are fewer, one repeats, or one is something else.

    Example:
        >>> Choice(("adamw", "lion")).middle
        'adamw'
    """

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        for value in self.values:
            if not isinstance(value, (str, int, float, bool)):
                raise UsageError(f"a choice should be a text, a number or a boolean, got {value!r}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"a choice should be a finite number, got {value!r}.")
        if len(self.values) < 2 or len({str(value) for value in self.values}) != len(self.values):
            shown = ", ".join(map(str, self.values)) or "none"
            raise UsageError(f"a choice needs at least two different values, got {shown}.")

    @property
    def middle(self) -> Value:
        """The first value."""
        return self.values[0]

    @property
    def ends(self) -> tuple[Value, ...]:
        """Every value: none lies between the others."""
        return self.values

    def suggest(self, trial: Suggests, name: str) -> Value:
        """Draw a value for a trial; the second call for a name returns the same."""
        drawn: Value = trial.suggest_categorical(name, list(self.values))
        return drawn

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON data."""
        return {"values": list(self.values)}

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Dimension: TypeAlias = Range | Choice


def parse_space(texts: Iterable[str]) -> dict[str, Dimension]:
    """Read what a command line gives with `--space`.

    Args:
        texts: each `NAME=LOW:HIGH`, `NAME=LOW:HIGH:log`, `NAME=LOW:HIGH:int`, `NAME=LOW:HIGH:step=SIZE` (also several
            of them, such as `16:128:int:log`) or `NAME=A,B,C`.

    Returns:
        The dimensions by name, in order.

    Raises:
        UsageError: if a text is none of these, or a name is given twice.

    Example:
        >>> space = parse_space(["lr=1e-4:1e-1:log", "batch_size=16:128:int", "optimizer=adamw,lion"])
        >>> [f"{name} {dimension}" for name, dimension in space.items()]
        ['lr 0.0001:0.1:log', 'batch_size 16:128:int', 'optimizer adamw,lion']
    """
    space: dict[str, Dimension] = {}
    for text in texts:
        name, equals, rest = (part.strip() for part in text.partition("="))
        if not equals or not rest or not _NAME.fullmatch(name):
            raise UsageError(f"cannot read the space {text!r}: {_GRAMMAR}.")
        if name in space:
            raise UsageError(f"{name} is given twice in the space: once is enough.")
        space[name] = parse_dimension(name, rest)
    return space


def parse_dimension(name: str, text: str) -> Dimension:
    """Read what stands behind `NAME=`; see `parse_space`.

    Raises:
        UsageError: if it is neither a range nor a choice.
    """
    parts = [part.strip() for part in text.split(":")]
    try:
        if len(parts) == 1:
            return Choice(tuple(part.strip() for part in text.split(",") if part.strip()))
        options: dict[str, Any] = {}
        for part in parts[2:]:
            word, equals, value = part.partition("=")
            if (word, equals) == ("step", "="):
                options["step"] = _number(value)
                if not options["step"]:
                    raise UsageError("step of a range should be above 0, got 0.")
            elif part in ("log", "int"):
                options["integer" if part == "int" else part] = True
            else:
                raise UsageError(f"unknown ending {part!r}; valid: int, log, step=SIZE.")
        return Range(_number(parts[0]), _number(parts[1]), **options)
    except UsageError as error:
        raise UsageError(f"{name}={text} is no space: {error}") from None


def space_from(given: Mapping[str, Dimension | str] | Iterable[str]) -> dict[str, Dimension]:
    """Return a space from dimensions by name (texts are read as `parse_dimension` does), or from texts.

    Raises:
        UsageError: if a dimension or a name is not usable.
    """
    if isinstance(given, str):
        raise UsageError(f"a space should be a mapping, or a list of texts, got {given!r}.")
    if not isinstance(given, Mapping):
        return parse_space(given)
    space: dict[str, Dimension] = {}
    for name, dimension in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"a name in a space should be a word, got {name!r}.")
        if isinstance(dimension, str):
            dimension = parse_dimension(name, dimension)
        if not isinstance(dimension, (Range, Choice)):
            raise UsageError(
                f"{name} should be a Range, a Choice or a text such as '1e-4:1e-1:log', got {dimension!r}."
            )
        space[name] = dimension
    return space


def dimension_from_json(data: Mapping[str, Any]) -> Dimension:
    """Return the dimension that `to_json` described.

    Raises:
        UsageError: if it is none.
    """
    try:
        return Choice(tuple(data["values"])) if "values" in data else Range(**data)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{dict(data)!r} is neither a range nor a choice: {error}.") from None


def dimension_of(
    name: str,
    low: float | Sequence[Value],
    high: float | None = None,
    *,
    log: bool = False,
    integer: bool = False,
    step: float = 0.0,
) -> Dimension:
    """Return what the arguments of `suggest` describe.

    Raises:
        UsageError: if they are neither a range nor choices.
    """
    try:
        if isinstance(low, (list, tuple)) and high is None:
            return Choice(tuple(low))
        if isinstance(low, (int, float)) and high is not None:
            return Range(low, high, log=log, integer=integer, step=step)
    except UsageError as error:
        raise UsageError(f"cannot suggest {name}: {error}") from None
    raise UsageError(f"cannot suggest {name}: give LOW and HIGH, or a list of choices, got {low!r} and {high!r}.")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number.") from None
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number.")
    return value
