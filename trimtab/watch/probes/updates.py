"""Norms of the weights and of what the optimizer's step changed in them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.watch.norms import l2_norms
from trimtab.watch.probe import Probe, Reading, Scene


class Updates(Probe):
    """L2 norms of the weights and of the update, and their ratio by module.

    `update_norm = ||W_new - W_old||`, `update_ratio = ||W_new - W_old|| / ||W_old||` over the parameters of a module
    (a module whose weights are all zero has no ratio: NaN if it did not move, infinity if it did). A healthy ratio for
    Adam is around 1e-3. Holds a copy of the trainable parameters during the sampled steps only.
    """

    name = "updates"
    signals = {
        "update_norm": "L2 norm of the change that the optimizer's step made to the weights",
        "update_norm_by_module": "L2 norm of the change of each module's own parameters",
        "update_ratio_by_module": "norm of the change over norm of the weights, by module",
        "weight_norm": "L2 norm of all trainable weights, before the step",
        "weight_norm_by_module": "L2 norm of each module's own trainable weights, before the step",
    }

    def __init__(self) -> None:
        self._before: tuple[Tensor, ...] = ()
        self._readings: list[Reading] = []

    def before_update(self, scene: Scene) -> None:
        """Copy the weights."""
        self._before = tuple(torch._foreach_add([parameter.detach() for parameter in scene.parameters], 0))

    def after_update(self, scene: Scene) -> None:
        """Compare with the copy."""
        before, self._before = self._before, ()
        if not before:
            return
        modules = tuple(scene.modules)
        change = torch._foreach_sub([parameter.detach() for parameter in scene.parameters], before)
        moved, moved_by_module = scene.by_module(l2_norms(change))
        weight, weight_by_module = scene.by_module(l2_norms(before))
        self._readings = [
            Reading("update_norm", (), moved),
            Reading("update_norm_by_module", modules, moved_by_module),
            Reading("update_ratio_by_module", modules, moved_by_module / weight_by_module),
            Reading("weight_norm", (), weight),
            Reading("weight_norm_by_module", modules, weight_by_module),
        ]

    def read(self) -> Iterable[Reading]:
        """Give the norms of this step."""
        readings, self._readings = self._readings, []
        return readings
