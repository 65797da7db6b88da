"""AdamW against torch's, and Adam's first step."""

from __future__ import annotations

from trimtab.optim import AdamW
from trimtab.testing import OptimizerTestCase


class TestAdamW(OptimizerTestCase):
    def optimizer(self, params, **options):
        return AdamW(params, **{"lr": self.lr, **options})
