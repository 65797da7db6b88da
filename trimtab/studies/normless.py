"""A vision transformer without what usually keeps it stable: no layer norm, no warm-up, no weight decay."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.remedy import apply
from trimtab.studies._fitting import fit, last
from trimtab.workloads import workload
from trimtab.workloads.workload import seeded


def digits(seed: int, *, sigma_reparam: bool = False, lr: float = 0.001, steps: int = 300) -> dict[str, float]:
    """Train the transformer of `digits-vit` with every norm taken out, by Adam from its full rate on.

    Args:
        seed: of initialisation and batches.
        sigma_reparam: whether its weights are reparametrised.
        lr: learning rate of the first step; it falls along half a cosine.
        steps: of training.

    Returns:
        `loss` and `accuracy` on the test set, and `training_loss`, the mean of the last tenth of the steps; a run that
        diverged counts with the loss and accuracy it began with.
    """
    job = workload("digits-vit")
    job.prepare()
    model = job.model(seed)
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    if sigma_reparam:
        apply(model, "sigma-reparam")
    began = job.evaluate(model)

    def loss_at(step: int) -> torch.Tensor:
        inputs, targets = job.batch(seed, step, 32)
        return job.loss(model(inputs), targets)

    with seeded(seed):  # dropout
        training = last(fit(model.parameters(), loss_at, steps=steps, lr=lr))
    ended = job.evaluate(model)
    kept = ended if ended["loss"] <= began["loss"] else began  # also where the end is not finite
    return {"loss": kept["loss"], "accuracy": kept["accuracy"], "training_loss": training}
