"""What the workloads with classes and small data share: the split, the loss and the metrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.scalars import to_scalar
from trimtab.workloads.workload import Data, Workload, evaluating

_SPLIT_SEED = 20260101


class Classification(Workload):
    """Classes by cross-entropy; the whole test part is evaluated, and the accuracy on the training part beside it."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats; logits [B, V], targets [B]."""
        return F.cross_entropy(outputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return test loss and accuracy, and the training accuracy."""
        data = self.data
        with evaluating(model):
            outputs = model(data.test_inputs)
            return {
                "loss": to_scalar(self.loss(outputs, data.test_targets)),
                "accuracy": _accuracy(outputs, data.test_targets),
                "train_accuracy": _accuracy(model(data.train_inputs), data.train_targets),
            }


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return to_scalar((outputs.argmax(-1) == targets).double().mean())


def split(inputs: Tensor, targets: Tensor, share: float, source: str) -> Data:
    """Split samples at random into a training share and a test part, the same way every time."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, test = order[: int(share * len(order))], order[int(share * len(order)) :]
    return Data(inputs[train], targets[train], inputs[test], targets[test], source)
