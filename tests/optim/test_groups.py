"""Parameters land in the role and with the decay that they should have, once each."""

from __future__ import annotations

import pytest
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW, param_groups_for


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.mix = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


def _roles(groups):
    return {name: (group["role"], group["weight_decay"]) for group in groups for name, _ in group["params"]}


def test_roles_and_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    assert _roles(param_groups_for(model, weight_decay=0.2)) == {
        "0.weight": ("embedding", 0.0),
        "1.weight": ("matrix", 0.2),
        "1.bias": ("vector", 0.0),
        "2.weight": ("vector", 0.0),
        "2.bias": ("vector", 0.0),
        "3.weight": ("head", 0.2),
        "3.bias": ("vector", 0.0),
    }


def test_tied_weights_are_embeddings_and_occur_once():
    groups = param_groups_for(Tied())
    assert _roles(groups)["embed.weight"] == ("embedding", 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(Tied().parameters()))
    AdamW(groups)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert set(_roles(param_groups_for(model))) == {"1.weight", "1.bias"}


def test_the_head_can_be_named_and_asked_for():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert _roles(param_groups_for(model, head="0"))["0.weight"] == ("head", 0.1)
    assert _roles(param_groups_for(model, head="0"))["1.weight"] == ("matrix", 0.1)
    model.get_output_embeddings = lambda: model[0]
    assert _roles(param_groups_for(model))["0.weight"][0] == "head"


def test_decayed_roles_are_a_choice():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    roles = _roles(param_groups_for(model, decayed=("embedding", "vector")))
    assert roles["0.weight"][1] == 0.1
    assert roles["1.weight"][1] == 0.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: param_groups_for(nn.Linear(2, 2), decayed=("matrices",)), "'matrices', which is not a role"),
        (lambda: param_groups_for(nn.Linear(2, 2), head="out"), "head 'out' is not a module"),
        (lambda: param_groups_for(nn.Linear(2, 2).requires_grad_(False)), "no trainable parameter"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
