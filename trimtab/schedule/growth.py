"""Growth in the middle of a run: at given steps the model becomes another one, and its optimizer goes along.

    (model, optimizer) <- (grow(model), make_optimizer(grow(model)))    at the steps of the schedule

The optimizer's state of a parameter is kept where its name and shape are the same in both models; the others begin
anew. This drives lossless expansion (LEMON: Wang et al. 2023, arXiv:2310.07999), the levels of a V-cycle (`VCycle`) and
stacking alike: what grows is the caller's function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError

__all__ = ["GrowthSchedule", "carry_state"]

Grow = Callable[[nn.Module], nn.Module]


def carry_state(old: nn.Module, old_optimizer: Optimizer, new: nn.Module, new_optimizer: Optimizer) -> tuple[str, ...]:
    """Copy the optimizer's state of every parameter that has the same name and shape in a new model.

    Options of parameter groups (learning rate, decay) are taken over too if both optimizers have as many groups.

    Args:
        old: the model that was trained.
        old_optimizer: its optimizer, of the new one's class.
        new: the model to train from now on.
        new_optimizer: its optimizer; changed in place.

    Returns:
        Names of the parameters whose state was kept; all others begin anew.

    Raises:
        UsageError: if the optimizers are of different classes.
    """
    if type(old_optimizer) is not type(new_optimizer):
        kinds = f"{type(old_optimizer).__name__} and {type(new_optimizer).__name__}"
        raise UsageError(f"state is only carried between optimizers of one class, got {kinds}: pass carry=False.")
    if len(old_optimizer.param_groups) == len(new_optimizer.param_groups):
        for before, after in zip(old_optimizer.param_groups, new_optimizer.param_groups, strict=True):
            after.update({key: copy.deepcopy(value) for key, value in before.items() if key != "params"})
    known = dict(old.named_parameters())
    trained = {id(parameter) for group in new_optimizer.param_groups for parameter in group["params"]}
    kept = []
    for name, parameter in new.named_parameters():
        was = known.get(name)
        if (
            was is None
            or was.shape != parameter.shape
            or was not in old_optimizer.state
            or id(parameter) not in trained
        ):
            continue
        new_optimizer.state[parameter] = copy.deepcopy(old_optimizer.state[was])
        kept.append(name)
    return tuple(kept)


class GrowthSchedule:
    """Grows a model at given steps of its training, resumed exactly.

    Call `step` once before each training step, with the model and the optimizer in use, and go on with what it returns.
    A learning-rate scheduler belongs to the old optimizer: make a new one when the optimizer is another.

    Args:
        growths: from a step, counted from 0, to the function that returns the grown model; it may leave the old model
            as it is or take its parts. A function that holds state of its own (`VCycle`) is saved by its own
            `state_dict`.
        make_optimizer: builds the optimizer of a model.
        carry: whether the optimizer's state goes along where shapes agree.

    Raises:
        UsageError: if a step is not a whole number of at least 0, or a growth cannot be called.

    Example:
        >>> import torch
        >>> def wider(model):
        ...     return nn.Linear(1, 2)
        >>> schedule = GrowthSchedule({2: wider}, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> model = nn.Linear(1, 1)
        >>> optimizer = schedule.make_optimizer(model)
        >>> sizes = []
        >>> for _ in range(4):
        ...     model, optimizer = schedule.step(model, optimizer)
        ...     sizes.append(model.out_features)
        >>> sizes
        [1, 1, 2, 2]
    """

    def __init__(
        self, growths: Mapping[int, Grow], make_optimizer: Callable[[nn.Module], Optimizer], *, carry: bool = True
    ) -> None:
        for step, grow in growths.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 0 or not callable(grow):
                raise UsageError(
                    f"growths must map steps, at least 0, to functions of a model, got {step!r}: {grow!r}."
                )
        self.growths = dict(sorted(growths.items()))
        self.make_optimizer = make_optimizer
        self.carry = carry
        self.steps = 0

    def step(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Begin a training step.

        Args:
            model: in use.
            optimizer: of that model.

        Returns:
            Both as they are, or the grown model, on the old one's device and in its mode, and its new optimizer.

        Raises:
            UsageError: if the state cannot be carried over.
        """
        grow = self.growths.get(self.steps)
        self.steps += 1
        if grow is None:
            return model, optimizer
        grown = _like(model, grow(model))
        fresh = self.make_optimizer(grown)
        if self.carry:
            carry_state(model, optimizer, grown, fresh)
        return grown, fresh

    def state_dict(self) -> dict[str, int]:
        """Return how many steps have begun."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved step. `restore` builds the model of that step.

        Args:
            state: what `state_dict` returned.
        """
        self.steps = int(state["steps"])

    def restore(self, model: nn.Module) -> tuple[nn.Module, Optimizer]:
        """Return a model and optimizer of the right shapes to load the states of the saved step into.

        Args:
            model: a fresh model of step 0.

        Returns:
            The model after every growth so far, and an optimizer of it; the weights are still to be loaded.
        """
        for step, grow in self.growths.items():
            if step < self.steps:
                model = _like(model, grow(model))
        return model, self.make_optimizer(model)


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    first = next(old.parameters(), None)
    if first is not None:
        new = new.to(first.device)
    return new.train(old.training)


CARD = Card(
    name="growth",
    room="schedule",
    summary="grows the model at given steps and takes the optimizer's state along",
    paper=Paper("LEMON: Lossless Model Expansion", 2023, arxiv="2310.07999"),
    equation="(model, optimizer) <- (grow(model), make_optimizer(grow(model))); states kept where name and shape agree",
    claim="A large model grown from a trained small one reaches its loss with 33 % (BERT) to 57 % (ViT) less compute.",
    acts_on="run",
    entry="trimtab.schedule.growth:GrowthSchedule",
    defaults=(Default("carry", True, "ours: the paper starts the large model's optimizer anew (recalled)"),),
    verified={
        "equation": (
            "tests/schedule/test_growth.py::test_growing_into_the_same_model_changes_nothing",
            "tests/schedule/test_growth.py::test_state_is_kept_where_names_and_shapes_agree",
            "tests/schedule/test_growth.py::test_resumes_exactly_before_and_after_a_growth",
        ),
    },
    deviations=(
        "Only the moment and the moving of states: how a model is expanded without loss is the caller's function.",
        "Step counts of states that are kept go on while those of new parameters begin at 0; LEMON's advice to decay "
        "the learning rate faster after a growth is left to the schedule.",
    ),
)
