"""Small tables from scikit-learn: `tabular` (breast cancer, two classes) and `regression` (diabetes progression)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import require
from trimtab.scalars import to_scalar
from trimtab.workloads.classification import Classification, split
from trimtab.workloads.settings import Settings
from trimtab.workloads.workload import Data, Workload, evaluating


class Tabular(Classification):
    """569 tumours with 30 measurements each, malignant or benign; a quarter of them to test on."""

    name = "tabular"
    summary = "breast-cancer table (30 columns, two classes), ReLU network"
    width = 64
    defaults = Settings(lr=0.001, beta2=0.999, weight_decay=0.1, clip=1.0, steps=200, batch_size=64)
    sources: ClassVar[Mapping[str, str]] = {
        "lr": "ours: of 0.001, 0.003 and 0.01 the lowest test loss over seeds 0 to 2",
        "beta2": "Adam (arXiv:1412.6980)",
        "steps": "ours: less than a second",
    }

    def load(self) -> Data:
        """Load scikit-learn's breast-cancer table, standardised by the training part."""
        bunch = require("sklearn.datasets", extra="workloads").load_breast_cancer()
        data = split(
            torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).long(), 0.75, "scikit-learn breast cancer"
        )
        return _standardised(data)

    def build(self, width: int, depth: int) -> nn.Module:
        """Build the network with torch's own initialisation."""
        return nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


class Regression(Workload):
    """442 patients with ten measurements each and the progression of their diabetes; a quarter of them to test on."""

    name = "regression"
    summary = "diabetes table (10 columns, progression after a year), tanh network, squared error"
    width = 32
    defaults = Settings(lr=0.003, beta2=0.999, weight_decay=0.1, clip=1.0, steps=200, batch_size=64)
    sources: ClassVar[Mapping[str, str]] = {
        "lr": "ours: of 0.001, 0.003 and 0.01, which differ by less than the seeds do, the middle",
        "beta2": "Adam (arXiv:1412.6980)",
        "steps": "ours: less than a second",
    }

    def load(self) -> Data:
        """Load scikit-learn's diabetes table; inputs and targets standardised by the training part."""
        bunch = require("sklearn.datasets", extra="workloads").load_diabetes()
        data = split(torch.from_numpy(bunch.data), torch.from_numpy(bunch.target), 0.75, "scikit-learn diabetes")
        mean, std = data.train_targets.mean(), data.train_targets.std()
        train, test = (((part - mean) / std).float() for part in (data.train_targets, data.test_targets))
        return _standardised(Data(data.train_inputs, train, data.test_inputs, test, data.source))

    def build(self, width: int, depth: int) -> nn.Module:
        """Build the network with torch's own initialisation."""
        return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error, in units of the targets' variance; outputs and targets [B]."""
        return F.mse_loss(outputs, targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the squared error on the test part."""
        data = self.data
        with evaluating(model):
            return {"loss": to_scalar(self.loss(model(data.test_inputs), data.test_targets))}


def _standardised(data: Data) -> Data:
    mean, std = data.train_inputs.mean(0), data.train_inputs.std(0)
    train, test = (((part - mean) / std).float() for part in (data.train_inputs, data.test_inputs))
    return Data(train, data.train_targets, test, data.test_targets, data.source)
