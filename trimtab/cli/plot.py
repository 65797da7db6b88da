"""A small plot for terminals: loss against learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MARKS = "o+x*#@"
_BOTH = "&"
_COLUMN = 10
_MARGIN = 9


def curves(lrs: Sequence[float], losses: Mapping[str, Sequence[float]], *, height: int = 12) -> list[str]:
    r"""Draw loss curves over a shared grid of learning rates, one mark for each curve.

    Args:
        lrs: the grid.
        losses: for each curve's label, one finite loss for each learning rate.
        height: rows.

    Returns:
        Lines: the plot, its axis and a legend.

    Example:
        >>> print("\n".join(curves([0.01, 0.1], {"without": [1.0, 3.0], "with": [1.0, 2.0]}, height=3)))
             3.00 |              o
             2.00 |              +
             1.00 |    &
                  +--------------------
                     0.01      0.1
        o without   + with   & several
    """
    values = [value for curve in losses.values() for value in curve]
    low, high = min(values), max(values)
    span = high - low or 1.0
    grid = [[" "] * (_COLUMN * len(lrs)) for _ in range(height)]
    shared = False
    for place, curve in enumerate(losses.values()):
        for index, value in enumerate(curve):
            row = round((high - value) / span * (height - 1))
            column = index * _COLUMN + _COLUMN // 2 - 1
            taken = grid[row][column] != " "
            shared |= taken
            grid[row][column] = _BOTH if taken else _MARKS[place % len(_MARKS)]
    lines = [
        f"{high - span * row / max(1, height - 1):>{_MARGIN}.2f} |{''.join(cells)}".rstrip()
        for row, cells in enumerate(grid)
    ]
    lines.append(" " * (_MARGIN + 1) + "+" + "-" * (_COLUMN * len(lrs)))
    lines.append((" " * (_MARGIN + 2) + "".join(f"{lr:^{_COLUMN}.3g}" for lr in lrs)).rstrip())
    legend = [f"{_MARKS[place % len(_MARKS)]} {label}" for place, label in enumerate(losses)]
    return [*lines, "   ".join([*legend, f"{_BOTH} several"] if shared else legend)]
