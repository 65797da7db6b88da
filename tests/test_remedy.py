"""apply and remove change a model in place, say what they changed, and refuse with one line what they cannot do."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import trimtab
from trimtab.catalogue import methods
from trimtab.errors import UsageError
from trimtab.remedy import Applied, apply, remove
from trimtab.workloads.workload import workload


def test_says_what_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    applied = apply(model, "sigma-reparam")
    assert isinstance(applied, Applied)
    assert applied.method == "sigma-reparam"
    assert applied.changes == {"0": "weight = gamma / sigma(W) * W, gamma = 1"}
    assert str(applied) == "sigma-reparam: 1 module(s) changed\n  0: weight = gamma / sigma(W) * W, gamma = 1"


def test_the_model_itself_has_a_name_to_show():
    assert "  (the model): weight = " in str(apply(nn.Linear(2, 2), "sigma-reparam"))


def test_reached_from_the_package():
    model = nn.Linear(2, 2)
    trimtab.apply(model, "sigma-reparam")
    assert trimtab.remove(model, "sigma-reparam").changes == {"": "weight merged"}


_NOT_FOR = {
    "lm-small": {
        "log-cpb": "window",
        "qr-attention": "is causal",
        "scaled-sigmoid": "no nn.Sigmoid",
        "sinkhorn-attention": "is causal",
        "stable-rank-norm": "no convolution",
        "tune-mode": "no convolution",
    },
    "digits-vit": {
        "gated-deltanet": "no causal attention",
        "gla": "no causal attention",
        "log-cpb": "window",
        "monarch": "at least 64 wide",
        "scaled-sigmoid": "no nn.Sigmoid",
        "stable-rank-norm": "no convolution",
        "tune-mode": "no convolution",
    },
}
"""Methods that have nothing to change in a workload's model, and what they say."""


@pytest.mark.parametrize(
    "card", [card for card in methods() if card.acts_on == "model" and card.apply], ids=lambda card: card.name
)
@pytest.mark.parametrize("name", ["lm-small", "digits-vit"])
def test_workload_models_train_with_it_and_lose_it_again(name, card):
    job = workload(name)
    model = job.model(seed=0)
    keys = set(model.state_dict())
    if (text := _NOT_FOR[name].get(card.name)) is not None:
        with pytest.raises(UsageError, match=text):
            apply(model, card.name)
        assert set(model.state_dict()) == keys
        return
    needs_base = "base" in inspect.signature(card.apply).parameters
    applied = apply(model, card.name, **({"base": job.model(seed=0, width=job.width // 2)} if needs_base else {}))
    inputs, targets = job.batch(seed=0, step=0, batch_size=2)
    job.loss(model(inputs), targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if card.remove is not None:
        assert set(remove(model, card.name).changes) == set(applied.changes)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: apply(nn.Linear(2, 2), "sigma-reparm"),
            "unknown method 'sigma-reparm'. Did you mean 'sigma-reparam'?",
        ),
        (lambda: apply(torch.zeros(2), "qk-norm"), "apply needs a torch.nn.Module to change, got Tensor"),
        (
            lambda: apply(nn.Linear(2, 2), "z-loss"),
            "z-loss acts on the loss, not on the model: use trimtab.losses.zloss",
        ),
        (lambda: apply(nn.Linear(2, 2), "lower-lr"), "lower-lr acts on the settings"),
        (lambda: apply(nn.Linear(2, 2), "mup"), "mup: missing a required argument: 'base'"),
        (lambda: apply(nn.Linear(2, 2), "sigma-reparam", rank=3), "got an unexpected keyword argument 'rank'"),
        (lambda: apply(nn.Linear(2, 2), "qk-norm"), "no attention to change in Linear"),
        (lambda: remove(nn.Linear(2, 2), "sigma-reparam"), "is not applied to Linear: nothing to remove"),
        (lambda: remove(nn.Linear(2, 2), "z-loss"), "z-loss cannot be removed"),
    ],
)
def test_refusals_are_one_line(call, text):
    with pytest.raises(UsageError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
