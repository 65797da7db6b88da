"""The catalogue: every Card, collected from the rooms when it is asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trimtab.card import Card
from trimtab.errors import choose
from trimtab.names import FINDING_NAMES, ROOMS


def _modules(package: str) -> Iterator[ModuleType]:
    """Import and yield every module of a room, at any depth; a room that does not exist yet is empty."""
    if importlib.util.find_spec(package) is None:
        return
    root = importlib.import_module(package)
    for info in sorted(pkgutil.walk_packages(root.__path__, package + "."), key=lambda info: info.name):
        yield importlib.import_module(info.name)


@functools.cache
def _cards() -> dict[str, Card]:
    found: dict[str, Card] = {}
    for room in ROOMS:
        for module in _modules(f"trimtab.{room}"):
            card = vars(module).get("CARD")
            if not isinstance(card, Card):
                continue
            if card.name in found:
                raise RuntimeError(f"two Cards are named {card.name!r}: {found[card.name].entry} and {card.entry}.")
            found[card.name] = card
    return found


def methods(*, room: str | None = None, treats: str | None = None) -> list[Card]:
    """Return the Cards of all methods, or of one room, or of those that treat one finding (in order of remedy).

    Args:
        room: a room's name, such as `"layers"`.
        treats: a finding's name, such as `"attention-logit-growth"`.

    Returns:
        Cards, by room and name, or by order of remedy when `treats` is given.

    Raises:
        UsageError: if the room or the finding does not exist.

    Example:
        >>> [card.name for card in methods(treats="softmax-collapse")][:1]
        ['stablemax']
    """
    cards = list(_cards().values())
    if room is not None:
        choose("room", room, ROOMS)
        cards = [card for card in cards if card.room == room]
    if treats is not None:
        choose("finding", treats, FINDING_NAMES)
        cards = [card for card in cards if treats in card.treats]
        return sorted(cards, key=lambda card: (card.treats[treats], card.name))
    return sorted(cards, key=lambda card: (ROOMS.index(card.room), card.name))


def method(name: str) -> Card:
    """Return the Card of one method.

    Raises:
        UsageError: if no method has that name; the nearest name is proposed.
    """
    cards = _cards()
    return cards[choose("method", name, cards)]


def public_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a room, so that a new method file is exported by its `__all__` alone."""

    @functools.cache
    def table() -> dict[str, Any]:
        return {name: getattr(module, name) for module in _modules(package) for name in getattr(module, "__all__", ())}

    def lookup(name: str) -> Any:
        if not name.startswith("_") and name in table():
            return table()[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return lookup, lambda: sorted(table())
