"""The fine-tuning study: adapters start from the same model, are of the same size, and a seed fixes the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies import graph_attention as study
from trimtab.studies.graph_attention import fine_tuning

SMALL = {"steps": 2, "pretraining": 2}


@pytest.mark.parametrize("adapter", ["lora", "sparse-gin"])
def test_same_seed_same_numbers(adapter):
    first = fine_tuning(1, adapter=adapter, **SMALL)
    assert first == fine_tuning(1, adapter=adapter, **SMALL)
    assert all(math.isfinite(value) for value in first.values())
    assert first["gap"] == first["test_loss"] - first["train_loss"]


def test_adapters_start_from_the_same_model_at_the_same_size():
    lora, gin = (fine_tuning(0, adapter=adapter, **SMALL) for adapter in ("lora", "sparse-gin"))
    assert lora["pretrained_loss"] == gin["pretrained_loss"]
    assert lora["test_loss"] != gin["test_loss"]
    assert 0.94 < gin["parameters"] / lora["parameters"] < 1.06


@pytest.mark.parametrize("adapter", ["lora", "sparse-gin"])
def test_an_adapter_changes_nothing_at_first_and_only_it_is_trained(adapter):
    torch.manual_seed(0)
    model = study._Model().eval()
    tokens = torch.randint(16, (4, 33), generator=torch.Generator().manual_seed(0))
    before = model.loss(tokens)
    trained = study._adapt(model, adapter)
    model.eval()
    torch.testing.assert_close(model.loss(tokens), before)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == len(trained)
    assert all(".gin." in name or ".down." in name or ".up." in name for name in names)


def test_sequences_follow_their_table():
    table = torch.eye(16).roll(1, 1).expand(3, -1, -1)  # i is always followed by i + 1
    tokens = study._sequences(torch.Generator().manual_seed(0), table)
    assert tokens.shape == (3, 33)
    assert ((tokens[:, 1:] - tokens[:, :-1]) % 16 == 1).all()


def test_a_run_that_diverges_counts():
    assert all(math.isfinite(value) for value in fine_tuning(0, lr=1e9, **SMALL).values())


def test_unknown_adapter():
    with pytest.raises(UsageError, match="Did you mean 'lora'"):
        fine_tuning(0, adapter="lore")
