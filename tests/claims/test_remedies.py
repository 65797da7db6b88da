"""The mechanism that each remedy's paper claims, at a size that a test can afford.

What it does to the loss takes longer runs and pairs: those are the experiments on the Cards (`trimtab reproduce NAME`).
"""

from __future__ import annotations

import functools
import tempfile

import pytest

from trimtab.workloads import Outcome, train, workload


@functools.cache
def attention_run(*remedies: str) -> Outcome:
    """A small language model at thirty times its tuned learning rate."""
    settings = workload("lm-small").defaults.replace(lr=0.3, steps=120, batch_size=8, remedies=remedies)
    with tempfile.TemporaryDirectory() as folder:
        return train("lm-small", settings, out=folder)


@functools.cache
def drift_run(*remedies: str) -> Outcome:
    """Modular addition without weight decay, a little beyond the step at which its logits have drifted."""
    settings = workload("modadd-nodecay").defaults.replace(steps=700, remedies=remedies)
    with tempfile.TemporaryDirectory() as folder:
        return train("modadd-nodecay", settings, out=folder)


def test_the_fault_is_there_without_a_remedy():
    sick = attention_run()
    assert sick.mechanism["attention_max_logit"] > 1000
    assert sick.mechanism["attention_entropy"] < 0.05


@pytest.mark.parametrize("remedy", ["qk-norm", "sigma-reparam"])
def test_attention_logits_stay_bounded_and_entropy_does_not_collapse(remedy):
    sick, treated = attention_run(), attention_run(remedy)
    assert treated.mechanism["attention_max_logit"] < sick.mechanism["attention_max_logit"] / 10
    assert treated.mechanism["attention_entropy"] > 0.5


def test_z_loss_holds_log_z():
    drifted, treated = drift_run(), drift_run("z-loss")
    assert drifted.mechanism["logits_abs_log_z"] > 100
    assert treated.mechanism["logits_abs_log_z"] < drifted.mechanism["logits_abs_log_z"] / 5
    assert treated.mechanism["zero_loss_fraction"] < drifted.mechanism["zero_loss_fraction"]
