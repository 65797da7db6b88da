"""What the two modular-addition workloads are there to show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimtab.record import Run
from trimtab.workloads import train, workload


def test_modadd_generalises_long_after_it_has_fitted(tmp_path: Path) -> None:
    job = workload("modadd")
    job.evaluations = 20
    train(job, job.defaults.replace(steps=650), out=tmp_path)
    with Run(tmp_path) as run:
        fitted, accuracy = run.series("train_accuracy"), run.series("eval_accuracy")
    fit = int(fitted.steps[np.argmax(fitted.flat > 0.99)])
    grok = int(accuracy.steps[np.argmax(accuracy.flat > 0.95)])
    assert fit <= 60
    assert accuracy.up_to(200).flat[-1] < 0.1
    assert 400 <= grok <= 640
    assert accuracy.flat[-1] > 0.98


def test_without_decay_logits_drift_and_the_softmax_collapses(tmp_path: Path) -> None:
    job = workload("modadd-nodecay")
    job.evaluations = 20
    outcome = train(job, job.defaults.replace(steps=700), out=tmp_path)
    assert outcome.metrics["train_accuracy"] > 0.98
    assert outcome.metrics["accuracy"] < 0.1
    assert outcome.mechanism["zero_loss_fraction"] > 0.3
    with Run(tmp_path) as run:
        logits = run.series("logits_max")
    assert logits.flat.max() > 5 * logits.up_to(300).flat.max()
