"""`lm-zipf`: words by rank, most of them rare, and a loss that is split by how rare they are."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.workloads import Workload, workload


@pytest.fixture(scope="module")
def job() -> Workload:
    found = workload("lm-zipf")
    found.prepare()
    return found


def test_targets_are_the_next_words(job: Workload) -> None:
    data = job.data
    assert data.train_inputs.shape == data.train_targets.shape
    assert torch.equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    assert torch.equal(data.train_inputs[1:, 0], data.train_targets[:-1, -1])


def test_classes_are_the_words_by_rank_and_their_counts_fall_like_a_power_of_it(job: Workload) -> None:
    tokens = job.data.train_inputs.flatten()
    counts = torch.bincount(tokens, minlength=2048)[1:].double()
    assert (counts[:-1] >= counts[1:] - 2).all()  # the end of the text that fills no window is not counted
    slope = np.polyfit(np.log(np.arange(1, 2048)), np.log(counts.numpy()), 1)[0]
    assert -1.3 < slope < -0.7  # Zipf's law: -1
    assert counts[1024:].sum() / counts.sum() < 0.15
    # The commonest word of the same text, by the standard library's own means.
    root = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))[:4_000_000].decode(errors="replace")
    words = re.findall(r"\w+|[^\w\s]", text)[: len(tokens)]
    (_, most), *_ = Counter(words).most_common(1)
    assert counts[0] == pytest.approx(most, rel=0.001)


def test_the_loss_at_initialisation_is_that_of_a_uniform_guess(job: Workload) -> None:
    model = job.model(0)
    assert sum(p.numel() for p in model.parameters()) == 144_576
    assert job.evaluate(model)["loss"] == pytest.approx(np.log(2048), abs=0.1)


def test_the_rare_loss_is_that_of_the_rarer_half_of_known_words(job: Workload) -> None:
    model = job.model(0)
    with torch.no_grad():
        model.head.weight[5] += 3.0  # so that classes differ
    count = 4096 // 32
    chosen = [place * len(job.data.test_inputs) // count for place in range(count)]
    with torch.no_grad():
        log_p = model(job.data.test_inputs[chosen]).double().log_softmax(-1).numpy()
    targets = job.data.test_targets[chosen].numpy()
    losses = [
        (int(target), -log_p[row, column, target])
        for row, line in enumerate(targets)
        for column, target in enumerate(line)
    ]
    known = sorted(target for target, _ in losses if target)
    middle = float(np.median(known))
    rare = [loss for target, loss in losses if target > middle]
    found = job.evaluate(model)
    assert found["loss"] == pytest.approx(np.mean([loss for _, loss in losses]), rel=1e-4)
    assert found["rare_loss"] == pytest.approx(np.mean(rare), rel=1e-4)
    assert 0.4 < len(rare) / len(known) <= 0.5


def test_sizes_can_be_changed(job: Workload) -> None:
    assert len(job.model(0, depth=2).blocks) == 2
    assert job.model(0, width=16).head.weight.shape == (2048, 16)
