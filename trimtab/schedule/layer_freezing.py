"""Layer freezing by training dynamics: each step trains only the layers whose weights still move.

    d_l = mean |(W_l - W_l') / W_l'|        for the layers trained in this step, W' before it; others keep theirs

After each step the floor(rate n) of n layers with the smallest d are frozen for the next one (inter-layer scheduling,
SlimFit: Ardakani et al. 2023, arXiv:2305.18513). A frozen weight needs no gradient, no saved input and no update. Every
layer starts with an infinite distance, in random order, so that each is trained before any is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.scalars import to_floats

__all__ = ["LayerFreezing"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


class LayerFreezing:
    """Freezes the weights that move least, anew after each step; a context manager that unfreezes them at the end.

    Layers are the weight tensors of two dimensions or more, and those of normalisations, that the optimizer trains;
    biases are never frozen. Call `step` after each `optimizer.step`. A frozen weight has `requires_grad` off and no
    gradient, so that no optimizer touches it or its state; `close` gives every weight its own setting back.

    With `DistributedDataParallel` give it `find_unused_parameters=True`: it plans its communication for all weights.

    Args:
        model: the model that is trained.
        optimizer: that trains it.
        rate: share of the layers to freeze, in [0, 1), or a function of the step, counted from 0.
        keep: patterns of parameter names that are never frozen (`"head.*"`), as for file names.
        distance: `"elementwise"`, the mean relative change of an element as above, or `"norm"`: ||W - W'|| / ||W'||,
            which a few weights near 0 do not decide.
        seed: of the order in which layers are trained at first.

    Raises:
        UsageError: if an argument breaks its rule, or there is nothing to freeze.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with LayerFreezing(model, optimizer, rate=0.5) as freezing:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...         freezing.step()
        ...     print(len(freezing.frozen))
        1
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True

    References:
        Ardakani et al. 2023, arXiv:2305.18513; code in https://github.com/arashardakani/SlimFit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rate: float | Callable[[int], float] = 0.9,
        keep: Iterable[str] = (),
        distance: str = "elementwise",
        seed: int = 0,
    ) -> None:
        self.distance = choose("distance", distance, ("elementwise", "norm"))
        self._rate = rate if callable(rate) else lambda step: rate
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        norms = {id(module.weight) for module in model.modules() if isinstance(module, _NORMS)}
        patterns = tuple(keep)
        self._layers: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and id(parameter) in trained
            and (parameter.dim() > 1 or id(parameter) in norms)
            and not any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        if not self._layers:
            raise UsageError("there are no layers to freeze: the optimizer trains no weights that `keep` leaves over.")
        order = torch.randperm(len(self._layers), generator=torch.Generator().manual_seed(seed)).tolist()
        self._order = dict(zip(self._layers, order, strict=True))
        self.distances = dict.fromkeys(self._layers, math.inf)
        self.steps = 0
        self._before: dict[str, Tensor] = {}
        self._frozen: frozenset[str] = frozenset()
        self._freeze(self._least())

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the weights that are frozen in this step, in the model's order."""
        return tuple(name for name in self._layers if name in self._frozen)

    @torch.no_grad()
    def step(self) -> None:
        """Measure what the last optimizer step changed, and freeze for the next one."""
        active = [name for name in self._layers if name not in self._frozen]
        values = to_floats([self._moved(self._before[name], self._layers[name]) for name in active])
        self.distances.update({name: value[0] for name, value in zip(active, values, strict=True)})
        self.steps += 1
        self._freeze(self._least())

    def close(self) -> None:
        """Unfreeze every weight."""
        self._freeze(frozenset())
        self._before = {}

    def __enter__(self) -> LayerFreezing:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unfreeze every weight."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the distances, the frozen weights and the step, in plain values."""
        return {
            "steps": self.steps,
            "distances": dict(self.distances),
            "order": dict(self._order),
            "frozen": list(self.frozen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Load the model's weights first: the next distance is measured from them.

        Args:
            state: what `state_dict` returned, for a model of the same layers.

        Raises:
            UsageError: if the layers are others.
        """
        if set(state["distances"]) != set(self._layers):
            raise UsageError("the saved state is of other layers: build the same model, with the same `keep`.")
        self.steps = int(state["steps"])
        self.distances = {name: float(state["distances"][name]) for name in self._layers}
        self._order = {name: int(state["order"][name]) for name in self._layers}
        self._freeze(frozenset(state["frozen"]))

    def _least(self) -> frozenset[str]:
        rate = self._rate(self.steps)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise UsageError(f"rate must be in [0, 1), got {rate!r} at step {self.steps}.")
        ranked = sorted(self._layers, key=lambda name: (self.distances[name], self._order[name]))
        return frozenset(ranked[: int(rate * len(ranked))])

    def _freeze(self, frozen: frozenset[str]) -> None:
        for name, parameter in self._layers.items():
            parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None
        self._frozen = frozen
        self._before = {
            name: parameter.detach().clone() for name, parameter in self._layers.items() if name not in frozen
        }

    def _moved(self, before: Tensor, after: Tensor) -> Tensor:
        change = after.detach() - before
        # 0 / 0, a weight that is 0 and stays 0, has not moved.
        if self.distance == "norm":
            moved = change.norm()
            return torch.where(moved == 0, moved, moved / before.norm())
        return torch.where(change == 0, torch.zeros_like(change), (change / before).abs()).mean()


CARD = Card(
    name="layer-freezing",
    room="schedule",
    summary="trains in each step only the layers whose weights still move",
    paper=Paper(
        "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics",
        2023,
        arxiv="2305.18513",
        code="https://github.com/arashardakani/SlimFit",
    ),
    equation="d_l = mean |(W_l - W_l') / W_l'|; the floor(rate n) layers of smallest d are frozen in the next step",
    claim=(
        "Up to 95 % of the layers can be frozen in fine-tuning at 0.2 % less accuracy on average, for 2.2 times less "
        "memory (with quantised and pruned activations)."
    ),
    acts_on="run",
    entry="trimtab.schedule.layer_freezing:LayerFreezing",
    defaults=(
        Default("rate", 0.9, "authors' code: ViT on CIFAR-10 (0.91 for BERT on MRPC)"),
        Default("distance", "elementwise", "authors' code"),
        Default("keep", (), "ours; the authors keep ViT's classifier trained: give its name"),
        Default("seed", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_layer_freezing.py::test_equals_the_schedule_in_plain_loops",
            "tests/schedule/test_layer_freezing.py::test_frozen_weights_and_their_states_stay",
            "tests/schedule/test_layer_freezing.py::test_resumes_exactly",
        ),
        "claim": ("tests/schedule/test_layer_freezing.py::test_saves_no_inputs_for_frozen_layers",),
    },
    deviations=(
        "Only inter-layer scheduling: the paper's quantisation and pruning of the activations that freezing cannot "
        "spare (GELU, attention, normalisation) are not here.",
        "Distances start at infinity with a random order; the authors draw random numbers up to 1e10, of the same "
        "effect. A distance of 0 / 0 is 0; in the authors' code it is not a number.",
        "Gradients of frozen weights are cleared, so that stale ones are never applied.",
        "Measured (benchmarks/curricula.py, digits-vit fine-tuned for 100 steps, n=3): no evidence of a loss, but "
        "lower means (accuracy 46.6 %, half frozen 43.6 %, 90 % frozen 35.3 %); saved activations 3 % and 23 % less.",
    ),
)
