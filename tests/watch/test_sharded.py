"""The watch on two ranks: numbers of the whole model on every rank, and weights that it does not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from trimtab.record import Run
from trimtab.scalars import to_local_full
from trimtab.testing import run_ranks
from trimtab.watch import Watch

STEPS, BATCH = 4, 8


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def train(model, folder, rank, ranks, *, watched=True, poison=None):
    """Train on this rank's share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer, to=folder, every=2).start() if watched else None
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x, y = torch.randn(BATCH, 5, generator=generator), torch.randint(3, (BATCH,), generator=generator)
        if poison is not None and step == 1:
            x[-1] = poison
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.step(loss)
    if watch is not None:
        watch.close()
    return torch.cat([to_local_full(parameter.detach()).flatten() for parameter in model.parameters()])


def wrapped(how):
    model = make_model()
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_each_rank_records_the_numbers_of_the_whole_model(how, tmp_path):
    single = tmp_path / "single"
    weights = train(make_model(), single, 0, 1)
    results = run_ranks(lambda rank: train(wrapped(how), tmp_path / "ranks", rank, 2))
    unwatched = run_ranks(lambda rank: train(wrapped(how), None, rank, 2, watched=False))
    for watched, free in zip(results, unwatched, strict=True):
        assert torch.equal(watched, free)
        torch.testing.assert_close(watched, weights)
    with Run(single) as expected, Run(tmp_path / "ranks") as first, Run(tmp_path / "ranks", rank=1) as second:
        names = ["grad_norm", "grad_norm_by_module", "update_norm", "update_ratio_by_module", "weight_norm"]
        for name in names:
            np.testing.assert_allclose(first.series(name).values, expected.series(name).values, rtol=1e-5)
            np.testing.assert_array_equal(first.series(name).values, second.series(name).values)
        # Each rank's loss is that of its own share of the batch.
        both = (first.series("loss").flat + second.series("loss").flat) / 2
        np.testing.assert_allclose(both, expected.series("loss").flat, rtol=1e-5)
        assert "activation_rms" in first


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_is_seen_on_both_and_hangs_none(how, tmp_path):
    run_ranks(lambda rank: train(wrapped(how), tmp_path, rank, 2, poison=float("nan")), timeout=30)
    for rank in range(2):
        with Run(tmp_path, rank=rank) as run:
            assert not np.isfinite(run.series("grad_norm").flat[1:]).any()
            assert np.isfinite(run.series("grad_norm").flat[0])
            assert len(run.events("non-finite")) == 1
            assert run.events("non-finite")[0].step == 1
