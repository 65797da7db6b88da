"""Options of a method as a command line gives them: read by the signature that takes them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from trimtab.errors import UsageError, choose

Scalar: TypeAlias = bool | int | float | str | None


def checked(owner: str, options: Any, known: Mapping[str, inspect.Parameter]) -> tuple[tuple[str, Scalar], ...]:
    """Return options by name, each in the type that the signature gives it.

    Args:
        owner: the method, for errors.
        options: a mapping, or pairs of name and value; a value may be text.
        known: the parameters that are options.

    Raises:
        UsageError: if a name is unknown, or a value has another type.
    """
    found: dict[str, Scalar] = {}
    for key, value in pairs(options):
        if not known:
            raise UsageError(f"{owner} has no options, got {key!r}.")
        choose(f"option of {owner}", key, known)
        found[key] = _read(f"{key} of {owner}", value, known[key])
    return tuple(sorted(found.items()))


def pairs(options: Any) -> list[tuple[str, Any]]:
    """Return options as pairs of name and value.

    Raises:
        UsageError: if they are neither a mapping nor pairs, or a name is given twice.
    """
    items = options.items() if isinstance(options, Mapping) else options
    listed = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else [None]
    found = [tuple(item) for item in listed if isinstance(item, (tuple, list)) and len(item) == 2]
    if len(found) != len(listed) or not all(isinstance(key, str) for key, _ in found):
        raise UsageError(f"options should be a mapping of names to values, got {str(options)[:80]!r}.")
    if len({key for key, _ in found}) != len(found):
        raise UsageError(f"an option is given twice in {str(options)[:80]!r}: once is enough.")
    return [(str(key), value) for key, value in found]


def kinds(parameter: inspect.Parameter) -> tuple[str, ...]:
    """Return the plain types that a parameter takes, by its annotation or its default; none for anything else."""
    text = parameter.annotation if isinstance(parameter.annotation, str) else ""
    text = re.sub(r"Literal\[[^\]]*\]", "str", text)
    while text != (text := re.sub(r"[\w.]+\[[^\[\]]*\]", "", text)):
        pass
    found = set(re.findall(r"\b(bool|int|float|str|None)\b", text))
    if not found - {"None"} and isinstance(parameter.default, (bool, int, float, str)):
        found.add(type(parameter.default).__name__)
    return tuple(kind for kind in ("None", "bool", "int", "float", "str") if kind in found) if found - {"None"} else ()


def _read(what: str, value: Any, parameter: inspect.Parameter) -> Scalar:
    possible = kinds(parameter)
    for kind in possible:
        try:
            return _as(kind, value)
        except (ValueError, OverflowError):
            continue
    shown = " or ".join(possible).replace("bool", "true or false")
    raise UsageError(f"{what} should be {shown}, got {str(value)[:80]!r}.")


def _as(kind: str, value: Any) -> Scalar:
    """Return a value, or what a text says, as one of the plain types."""
    text = value.strip().lower() if isinstance(value, str) else None
    if kind == "None" and (value is None or text == "none"):
        return None
    if kind == "bool" and (isinstance(value, bool) or text in ("true", "false")):
        return value if text is None else text == "true"
    if kind == "int" and (text is not None or type(value) is int):
        return int(value)
    if kind == "float" and (text is not None or type(value) in (int, float)) and math.isfinite(number := float(value)):
        return number
    if kind == "str" and isinstance(value, str):
        return value.strip()
    raise ValueError(kind)
