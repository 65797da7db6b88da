"""The study of lossless expansion: deterministic, its options act, and the expansion itself costs no loss."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.expansion import growth


def test_deterministic_and_options_act():
    first = growth(3, start="expanded", budget=2)
    torch.rand(5)
    assert first == growth(3, start="expanded", budget=2)
    assert first["loss"] != growth(4, start="expanded", budget=2)["loss"]
    assert first["loss"] != growth(3, budget=2)["loss"]
    assert first["loss"] != growth(3, start="expanded", small=0.25, budget=2)["loss"]
    assert abs(first["bump"]) < 1e-5


@pytest.mark.parametrize(
    ("options", "text"), [({"start": "copied"}, "unknown start"), ({"small": 1.0}, "small must be between 0 and 1")]
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        growth(0, **options)
