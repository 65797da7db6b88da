"""lower-lr divides the learning rate of any settings, and refuses settings without one."""

from __future__ import annotations

import pytest

from trimtab.catalogue import method, methods
from trimtab.errors import UsageError
from trimtab.schedule import with_lower_lr


def test_divides_only_the_learning_rate():
    settings = {"lr": 0.3, "weight_decay": 0.1, "clip": 1.0}
    assert with_lower_lr(settings) == {"lr": 0.03, "weight_decay": 0.1, "clip": 1.0}
    assert with_lower_lr(settings, factor=3)["lr"] == pytest.approx(0.1)
    assert settings["lr"] == 0.3


def test_card_changes_settings():
    card = method("lower-lr")
    assert card.acts_on == "settings"
    assert card.apply({"lr": 1.0})["lr"] == 0.1


def test_place_among_the_remedies_of_attention_logit_growth():
    names = [card.name for card in methods(treats="attention-logit-growth")]
    assert names[:3] == ["qk-norm", "sigma-reparam", "lower-lr"]


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -10.0, float("inf"), float("nan")])
def test_factor_must_lower(factor):
    with pytest.raises(UsageError, match="factor must be above 1"):
        with_lower_lr({"lr": 0.1}, factor=factor)


@pytest.mark.parametrize("settings", [{}, {"lr": 0.0}, {"lr": -1.0}, {"lr": "0.1"}, {"lr": None}, {"lr": True}])
def test_settings_need_a_learning_rate(settings):
    with pytest.raises(UsageError, match="needs settings with an 'lr' above 0"):
        with_lower_lr(settings)
