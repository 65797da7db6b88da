"""Size and tails of the activations, by module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from trimtab.watch.probe import Collected, Probe, Reading

_SAMPLE = 2**16
"""Elements that the root mean square and the kurtosis are estimated from, in whole evenly spaced rows."""


class Activations(Probe):
    """Root mean square, largest absolute value and kurtosis of module outputs.

    `rms = sqrt(E[x^2])`, `max = max |x|`, `kurtosis = E[x^4] / E[x^2]^2` (about zero: 3 for a zero-mean Gaussian, up
    to the width for a single massive channel). The maximum is over every element; the moments are over at most 65,536
    elements in evenly spaced rows. A module that runs several times in one forward pass keeps its largest maximum and
    latest moments.
    """

    name = "activations"
    signals = {
        "activation_rms": "root mean square of a module's output",
        "activation_max": "largest absolute value in a module's output",
        "activation_kurtosis": "E[x^4] / E[x^2]^2 of a module's output; 3 for a Gaussian",
    }

    def __init__(self) -> None:
        self._rms = Collected()
        self._max = Collected(keep="largest")
        self._kurtosis = Collected()

    def on_output(self, module: str, output: Tensor) -> None:
        """Reduce one output to three numbers."""
        low, high = output.aminmax()
        self._max.add(module, high.maximum(-low))
        rows = output.reshape(-1, output.shape[-1]) if output.ndim > 1 else output.reshape(1, -1)
        squares = rows[:: max(1, rows.numel() // _SAMPLE)].float().square()
        second = squares.mean()
        self._rms.add(module, second.sqrt())
        self._kurtosis.add(module, squares.square().mean() / second.square())

    def read(self) -> Iterable[Reading]:
        """Give the statistics of this step."""
        yield from self._rms.reading("activation_rms")
        yield from self._max.reading("activation_max")
        yield from self._kurtosis.reading("activation_kurtosis")
