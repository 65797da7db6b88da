"""The optimizer contract holds for torch's own optimizers, and catches optimizers that break it."""

from __future__ import annotations

import pytest
import torch

from trimtab.optim import AdamW
from trimtab.testing import OptimizerTestCase


class _Torchs(OptimizerTestCase):
    """torch's optimizers have two ways of running, one format of state, and no policy."""

    paths = {"plain": {"foreach": False}, "foreach": {"foreach": True}}
    formats = ()
    policies = False


class TestAdamW(_Torchs):
    def optimizer(self, params, **options):
        return torch.optim.AdamW(params, **{"lr": self.lr, **options})


class TestSGD(_Torchs):
    def optimizer(self, params, **options):
        return torch.optim.SGD(params, **{"lr": self.lr, "momentum": 0.9, "weight_decay": 0.01, **options})


class _Broken(torch.optim.SGD):
    """SGD with one fault at a time."""

    def __init__(self, params, fault, **options):
        super().__init__(params, **options)
        self.fault = fault
        self.norm = 0.0

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if self.fault == "scales gradients" and p.grad is not None:
                    p.grad.mul_(0.5)
                if self.fault == "moves without a gradient" and p.grad is None:
                    p.data.mul_(0.9)
                if self.fault == "divides by the norm" and p.grad is not None:
                    p.grad = p.grad / p.grad.norm()
                if self.fault == "keeps state outside" and p.grad is not None:
                    self.norm += 1.0
                    p.data.mul_(1 - 1e-3 * self.norm)
                if self.fault == "draws numbers":
                    torch.rand(())
        return super().step(closure)


class _BrokenChain(AdamW):
    """AdamW of a chain with one fault at a time in an option."""

    def __init__(self, params, fault, **options):
        if fault == "takes non-finite gradients":
            options["nonfinite"] = "allow"
        if fault == "keeps every format in full" and options.get("state") != "fp32":
            options["state"] = "fp32"
        if fault == "computes otherwise in lists" and options.get("foreach"):
            options["eps"] = 1e-2
        super().__init__(params, **options)


@pytest.mark.parametrize(
    ("fault", "test", "arguments"),
    [
        ("takes non-finite gradients", "test_non_finite_gradients_change_nothing", ("skip", float("nan"))),
        ("keeps every format in full", "test_fewer_bits_keep_fewer_bytes", ()),
        ("computes otherwise in lists", "test_ways_of_running_agree", (torch.float64,)),
    ],
)
def test_catches_faults_of_options(fault, test, arguments):
    class Case(OptimizerTestCase):
        def optimizer(self, params, **options):
            return _BrokenChain(params, fault, **{"lr": self.lr, **options})

    with pytest.raises(AssertionError):
        getattr(Case(), test)(*arguments)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("scales gradients", "test_leaves_gradients_alone"),
        ("moves without a gradient", "test_missing_gradients_leave_parameters_alone"),
        ("keeps state outside", "test_resumes_bit_exactly_through_disk"),
        ("draws numbers", "test_draws_no_global_random_numbers"),
        ("divides by the norm", "test_zero_gradients_stay_finite"),
    ],
)
def test_catches(fault, test):
    class Case(OptimizerTestCase):
        def optimizer(self, params, **options):
            return _Broken(params, fault, **{"lr": self.lr, "momentum": 0.9, **options})

    arguments = (torch.float32,) if "disk" in test or "zero" in test else ()
    with pytest.raises(AssertionError):
        getattr(Case(), test)(*arguments)
