"""Faults in gradients: where they strike, how large they are, and that nothing happens when they are off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.workloads import Settings, parse_arm, train, workload
from trimtab.workloads.faults import inject

PLAIN = {"spikes": 0.0, "outliers": 0.0, "scale": 1000.0}


def parameters(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def gradients(made: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in made if parameter.grad is not None]


def test_a_spike_multiplies_one_tensor_and_strikes_all_alike() -> None:
    struck = []
    for step in range(300):
        made = parameters(3, 4, 5)
        before = gradients(made)
        inject(made, 0, step, spikes=1.0, outliers=0.0, scale=7.0)
        ratios = [float((after / old).mean()) for after, old in zip(gradients(made), before, strict=True)]
        assert sorted(ratios) == pytest.approx([1, 1, 7])
        struck.append(ratios.index(max(ratios)))
    assert stats.chisquare(np.bincount(struck, minlength=3)).pvalue > 1e-3


def test_spikes_come_with_their_probability() -> None:
    hits = 0
    for step in range(1000):
        made = parameters(2)
        before = gradients(made)
        inject(made, 3, step, spikes=0.2, outliers=0.0, scale=10.0)
        hits += not torch.equal(before[0], gradients(made)[0])
    assert stats.binomtest(hits, 1000, 0.2).pvalue > 1e-3


def test_outliers_are_students_t_of_the_tensors_scale_on_a_fraction_of_entries() -> None:
    made = parameters(200_000)
    [before] = gradients(made)
    inject(made, 0, 0, spikes=0.0, outliers=0.1, scale=50.0)
    noise = (gradients(made)[0] - before).numpy()
    changed = noise[noise != 0]
    assert len(changed) / len(noise) == pytest.approx(0.1, rel=0.03)
    t = changed / (50.0 * math.sqrt(float(before.square().mean())))
    assert stats.kstest(t, stats.t(df=2).cdf).pvalue > 1e-3
    assert np.isfinite(noise).all()
    assert np.abs(t).max() < 708


def test_faults_follow_from_seed_and_step_alone() -> None:
    def faulty(seed: int, step: int, outliers: float = 0.2) -> list[Tensor]:
        made = parameters(50, 60)
        inject(made, seed, step, spikes=0.5, outliers=outliers, scale=3.0)
        return gradients(made)

    before = torch.get_rng_state()
    first = faulty(1, 2)
    torch.rand(3)
    assert all(map(torch.equal, first, faulty(1, 2)))
    assert not all(map(torch.equal, first, faulty(1, 3)))
    assert not all(map(torch.equal, first, faulty(2, 2)))
    torch.set_rng_state(before)
    # Whether a step has a spike, and where, does not depend on the outliers.
    plain, quiet = parameters(50, 60), faulty(1, 2, outliers=0.0)
    struck = [bool((new != old).all()) for new, old in zip(quiet, gradients(plain), strict=True)]
    noisy = [float((new / old).median()) > 2 for new, old in zip(first, gradients(plain), strict=True)]
    assert struck == noisy


def test_parameters_without_a_gradient_are_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(2))
    inject([frozen], 0, 0, spikes=1.0, outliers=1.0, scale=2.0)
    assert frozen.grad is None


def test_zero_rates_change_nothing() -> None:
    made = parameters(4, 5)
    before = gradients(made)
    for step in range(20):
        inject(made, 0, step, **PLAIN)
    assert all(map(torch.equal, before, gradients(made)))


def test_a_run_with_spikes_takes_the_steps_of_a_loop_written_out() -> None:
    """After the backward pass and before clipping: a clipped spike points where its tensor's gradient does."""
    job = workload("regression")
    settings = job.defaults.replace(
        optimizer="sgd", momentum=0.0, lr=0.1, steps=3, clip=1.0, warmup=0.0, schedule="constant", weight_decay=0.0
    )
    outcome = train(job, settings.replace(spikes=0.5, outliers=0.01, spike_scale=30.0))
    model = job.model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        inputs, targets = job.batch(0, step, settings.batch_size)
        optimizer.zero_grad()
        job.loss(model(inputs), targets).backward()
        inject(model.parameters(), 0, step, spikes=0.5, outliers=0.01, scale=30.0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert outcome.loss == pytest.approx(job.evaluate(model)["loss"], rel=1e-6)
    assert outcome.loss != train(job, settings).loss


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("spikes=1.1", "spikes should be less than or equal to 1"),
        ("outliers=-0.1", "outliers should be greater than or equal to 0"),
        ("spikes=0.1,spike_scale=0", "spike_scale should be greater than 0"),
        ("spike_scale=10", "spike_scale has no effect without spikes or outliers"),
    ],
)
def test_rates_that_cannot_be_are_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_arm(text, Settings(lr=0.1, steps=5))
