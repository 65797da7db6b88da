"""The study of structured layers: deterministic, its options act, and every arm costs the same."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies._text import CONTEXT, build, multiplications
from trimtab.studies.structured import language_model


def test_deterministic_whatever_the_global_generator_and_options_act():
    first = language_model(3, layers="monarch", budget=1)
    torch.rand(5)
    assert first == language_model(3, layers="monarch", budget=1)
    assert first["loss"] != language_model(4, layers="monarch", budget=1)["loss"]
    assert first["loss"] != language_model(3, layers="monarch", budget=1, lr=0.02)["loss"]
    assert set(first) == {"loss", "early_loss", "steps", "share"}


@pytest.mark.parametrize("layers", ["low-rank", "block-shuffle", "block-dense"])
def test_guidance_costs_steps_and_acts(layers):
    dense, plain, guided = (
        language_model(3, budget=8, **options)
        for options in ({}, {"layers": layers}, {"layers": layers, "guided": 0.5})
    )
    assert dense["steps"] == 8
    assert dense["share"] == 1
    assert plain["steps"] == round(8 / plain["share"])
    assert 8 < guided["steps"] < plain["steps"]
    assert len({dense["loss"], plain["loss"], guided["loss"]}) == 3


def test_multiplications_are_those_of_the_matrices():
    model = build(0, 16, 2, 4)
    linears = sum(p.numel() for name, p in model.blocks.named_parameters() if "norm" not in name)
    assert linears == 2 * 12 * 16**2
    # The scores and their use: a row of L keys each, D wide, in every block.
    assert multiplications(model, linears) == linears + 256 * 16 + 2 * (CONTEXT * 16 + CONTEXT * 16)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"layers": "butterfly"}, "unknown kind of layers"), ({"guided": 0.5}, "guided must be 0 to 1, and 0 for dense")],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        language_model(0, **options)
