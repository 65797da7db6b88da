"""A range test leaves no trace: everything is bit for bit as before, also after errors and Ctrl-C."""

from __future__ import annotations

import copy
import itertools
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from trimtab.optim import AdamW, ScheduleFreeAdamW
from trimtab.tune import lr_range_test


class _Net(nn.Module):
    """Everything that a step can change: weights, running statistics, draws, plain attributes, a generator."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.calls = 0
        self.history = []
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        self.history.append(self.calls)
        self.seen = self.seen + 1  # another tensor in the buffer's place
        x = x + 0.01 * torch.randn(x.shape, generator=self.generator)
        return self.last(self.drop(self.norm(self.first(x)).relu()))


_OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "trimtab-adamw": lambda p: AdamW(p, lr=0.01),
    "schedule-free": lambda p: ScheduleFreeAdamW(p, lr=0.01),
}


def _setting(kind):
    torch.manual_seed(0)
    model = _Net()
    optimizer = _OPTIMIZERS[kind](model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50) if kind != "adamw" else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    return model, optimizer, scheduler, scaler, loader


def _loss(model, batch):
    random.random()
    np.random.random()  # noqa: NPY002
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def _train(model, optimizer, scheduler, scaler, loader, steps):
    losses = []
    for _, batch in zip(range(steps), itertools.chain.from_iterable(itertools.repeat(loader)), strict=False):
        optimizer.zero_grad()
        loss = _loss(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def _facts(model, optimizer, scheduler, scaler, loader):
    """All that can be seen of a setting, tensors as copies."""
    facts = {
        "model": model.state_dict(),
        "grads": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "plain": (model.calls, list(model.history), model.generator.get_state()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "scaler": scaler.state_dict(),
        "loader": (loader.generator.get_state(), loader._iterator),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state()),  # noqa: NPY002
        "wants": [p.requires_grad for p in model.parameters()],
        "attributes": sorted(vars(optimizer)) + sorted(vars(model)),
    }
    return copy.deepcopy(facts)


def _same(one, two):
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            _same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            _same(left, right)
    else:
        assert one == two


class _Wrong(Exception):
    pass


def _ending(kind):
    """A loss function that ends the test in some way at its twelfth call."""
    calls = itertools.count(1)

    def loss(model, batch):
        value = _loss(model, batch)
        if next(calls) == 12:
            if kind == "error":
                raise _Wrong
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            if kind == "nan":
                return value * float("nan")
            if kind == "vandal":
                with torch.no_grad():
                    for p in model.parameters():
                        p.data = torch.full_like(p, 7.0)
                        p.requires_grad_(False)
                model.extra = 1
                raise _Wrong
        return value

    return loss


@pytest.mark.parametrize("ending", ["end", "error", "interrupt", "signal", "nan", "vandal"])
@pytest.mark.parametrize("kind", sorted(_OPTIMIZERS))
def test_everything_is_as_before(kind, ending):
    setting = _setting(kind)
    model, optimizer, scheduler, scaler, loader = setting
    _train(*setting, steps=7)
    model.norm.eval()  # a mixture of modes
    pointers = [p.data_ptr() for p in model.parameters()]
    before = _facts(*setting)
    random_before = before["random"]
    options = {"scheduler": scheduler, "scaler": scaler, "lowest": 1e-3, "highest": 30.0, "steps": 30}
    expected = {"error": _Wrong, "vandal": _Wrong, "interrupt": KeyboardInterrupt, "signal": KeyboardInterrupt}
    if ending in expected:
        with pytest.raises(expected[ending]):
            lr_range_test(model, optimizer, _ending(ending), loader, **options)
    else:
        lr_range_test(model, optimizer, _ending(ending), loader, **options)
    after = _facts(*setting)
    _same(before, after)
    _same(random_before, after["random"])
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("kind", sorted(_OPTIMIZERS))
def test_training_goes_on_as_if_nothing_had_been(kind):
    def run(tested):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        setting = _setting(kind)
        losses = _train(*setting, steps=5)
        if tested:
            model, optimizer, scheduler, scaler, loader = setting
            lr_range_test(model, optimizer, _loss, loader, scheduler=scheduler, scaler=scaler, highest=1e3, steps=40)
        return losses + _train(*setting, steps=8), setting[0].state_dict()

    _same(run(tested=False), run(tested=True))


def test_a_fresh_scaler_and_optimizer_are_fresh_again():
    model, optimizer, scheduler, scaler, loader = _setting("sgd")
    lr_range_test(model, optimizer, _loss, loader, scheduler=scheduler, scaler=scaler, steps=12)
    assert scaler._scale is None
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_under_way_goes_on(workers):
    def epoch(tested):
        torch.manual_seed(0)
        data = TensorDataset(torch.arange(24.0).reshape(12, 2))
        loader = DataLoader(
            data,
            batch_size=2,
            shuffle=True,
            num_workers=workers,
            persistent_workers=bool(workers),
            timeout=30 * workers,
        )
        batches = []
        for _ in range(2):
            for place, (batch,) in enumerate(loader):
                batches.append(batch.clone())
                if tested and place == 2:
                    model = nn.Linear(2, 1)
                    with torch.no_grad():  # the model's own draws are not the test's
                        model.weight.fill_(0.1)
                        model.bias.fill_(0.1)
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                    lr_range_test(model, optimizer, lambda net, x: net(x[0]).square().mean(), loader, steps=10)
                elif place == 2:
                    nn.Linear(2, 1)
        return batches

    _same(epoch(tested=False), epoch(tested=True))


class _Stateful:
    """A loader that remembers where it stands, deep inside."""

    def __init__(self):
        self.inside = {"position": 0}

    def __iter__(self):
        while True:
            self.inside["position"] += 1
            yield torch.full((2, 3), float(self.inside["position"]))

    def state_dict(self):
        return self.inside

    def load_state_dict(self, state):
        self.inside.update(state)


def test_a_stateful_loader_is_put_back():
    loader = _Stateful()
    next(iter(loader))
    model = nn.Linear(3, 1)
    lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda net, x: net(x).square().mean(), loader, steps=10
    )
    assert loader.inside == {"position": 1}


class _Drawing:
    """A loader without state_dict that counts its epochs and draws from a generator of its own."""

    def __init__(self):
        self.epoch = 0
        self.random = np.random.default_rng(0)

    def __iter__(self):
        self.epoch += 1
        yield torch.tensor(self.random.normal(size=(2, 3)), dtype=torch.float32)


def test_a_loaders_own_attributes_are_put_back():
    loader, other = _Drawing(), _Drawing()
    model = nn.Linear(3, 1)
    lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda net, x: net(x).square().mean(), loader, steps=10
    )
    assert loader.epoch == 0
    _same(list(loader), list(other))


def test_samplers_and_their_generators_are_put_back():
    sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=2, sampler=sampler)
    before = sampler.generator.get_state()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_range_test(model, optimizer, lambda net, x: net(x[0]).square().mean(), loader, steps=10)
    assert torch.equal(sampler.generator.get_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_devices_generators_are_put_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True)
    before = copy.deepcopy([torch.cuda.get_rng_state_all(), model.state_dict(), optimizer.state_dict()])
    scaler = torch.amp.GradScaler("cuda")
    batch = torch.ones(8, 4, device="cuda")
    lr_range_test(model, optimizer, lambda net, x: (net(x) - 1).square().mean(), [batch], scaler=scaler, steps=20)
    _same(before, [torch.cuda.get_rng_state_all(), model.state_dict(), optimizer.state_dict()])
