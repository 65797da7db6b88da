"""The cached gradient equals that of the whole batch: in one process, with dropout, buffers, autocast and two ranks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trimtab.errors import UsageError
from trimtab.losses import cached_contrastive_step, lejepa_loss, multiple_negatives_ranking_loss, supcl_seq_loss
from trimtab.testing import run_ranks


def _encoder(dropout=0.0, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    parts = [nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)]
    return nn.Sequential(*parts).to(dtype)


def _batches(size=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator, dtype=dtype) for _ in range(2)]


def _gradients(*modules):
    return [parameter.grad.clone() for module in modules for parameter in module.parameters()]


def _same(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 10, 99])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_whole_batch(micro_batch, shared):
    """One encoder for both sides or two; the loss has a parameter of its own."""
    first, second = _encoder(), _encoder(seed=2)
    encoders = [first, first] if shared else [first, second]
    modules = [first] if shared else [first, second]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    batches = _batches()

    def loss(a, p):
        return multiple_negatives_ranking_loss(scale * a, p, symmetric=True)

    whole = loss(*(encode(x) for encode, x in zip(encoders, batches, strict=True)))
    whole.backward()
    expected, own = _gradients(*modules), scale.grad.clone()
    for module in modules:
        module.zero_grad()
    scale.grad = None
    value = cached_contrastive_step(first if shared else encoders, batches, loss, micro_batch=micro_batch)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-12, atol=0)
    assert not value.requires_grad
    _same(_gradients(*modules), expected)
    torch.testing.assert_close(scale.grad, own, rtol=1e-10, atol=0)


def test_differs_from_accumulated_micro_batches():
    """What it is for: gradients of the micro-batches' own losses are not those of the whole batch."""
    encoder, batches = _encoder(), _batches()
    cached_contrastive_step(encoder, batches, multiple_negatives_ranking_loss, micro_batch=5)
    cached = _gradients(encoder)
    encoder.zero_grad()
    for a, p in zip(*(x.split(5) for x in batches), strict=True):
        (multiple_negatives_ranking_loss(encoder(a), encoder(p)) / 2).backward()
    gap = max(float((x - y).abs().max()) for x, y in zip(cached, _gradients(encoder), strict=True))
    assert gap > 1e-3


@pytest.mark.parametrize("micro_batch", [3, 5])
def test_dropout_is_played_back(micro_batch):
    encoder, batches = _encoder(dropout=0.5), _batches()
    torch.manual_seed(3)
    rows = [torch.cat([encoder(part) for part in x.split(micro_batch)]) for x in batches]
    multiple_negatives_ranking_loss(*rows).backward()
    expected, after = _gradients(encoder), torch.rand(3)
    encoder.zero_grad()
    torch.manual_seed(3)
    cached_contrastive_step(encoder, batches, multiple_negatives_ranking_loss, micro_batch=micro_batch)
    assert torch.equal(torch.rand(3), after), "random numbers go on as after one pass"
    _same(_gradients(encoder), expected)


def test_random_numbers_of_the_loss_are_drawn_once():
    encoder, batches = _encoder(dropout=0.5), _batches()
    seen = []

    def loss(a, p):
        seen.append(torch.rand(1))
        return multiple_negatives_ranking_loss(a, p)

    torch.manual_seed(4)
    cached_contrastive_step(encoder, batches, loss, micro_batch=4)
    assert len(seen) == 1
    assert not torch.equal(torch.rand(1), seen[0])


def test_buffers_move_once():
    encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    twin = copy.deepcopy(encoder)
    batches = _batches()
    rows = [torch.cat([twin(part) for part in x.split(5)]) for x in batches]
    multiple_negatives_ranking_loss(*rows).backward()
    cached_contrastive_step(encoder, batches, multiple_negatives_ranking_loss, micro_batch=5)
    _same(_gradients(encoder), _gradients(twin))
    for found, expected in zip(encoder.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autocast_keeps_gradients():
    encoder, batches = _encoder(dtype=torch.float32), _batches(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        multiple_negatives_ranking_loss(*(encoder(x) for x in batches)).backward()
    expected = _gradients(encoder)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_contrastive_step(encoder, batches, multiple_negatives_ranking_loss, micro_batch=5)
    _same(_gradients(encoder), expected, tolerance=2e-2)


def test_other_losses_and_inputs():
    """Any loss of embeddings works; keyword and positional arguments are split where they are tensors."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _encoder()

        def forward(self, x, factor, power=1):
            return self.inner(x) * factor.unsqueeze(1) ** power

    encoder, (x, _) = Scaled(), _batches()
    factor, labels = torch.linspace(0.5, 2, 10, dtype=torch.float64), torch.arange(10) % 3
    named = {"x": x, "factor": factor, "power": 2}
    losses = [
        lambda z, y: supcl_seq_loss(torch.stack([z, y]), labels),
        lambda z, y: lejepa_loss(torch.stack([z, y]), 5, slices=8),
    ]
    for loss in losses:
        encoder.zero_grad()
        loss(encoder(x, factor), encoder(**named)).backward()
        expected = _gradients(encoder)
        encoder.zero_grad()
        cached_contrastive_step(encoder, [(x, factor), named], loss, micro_batch=4)
        _same(_gradients(encoder), expected)


def test_an_encoder_may_be_frozen():
    trained, frozen, batches = _encoder(), _encoder().requires_grad_(False), _batches()
    multiple_negatives_ranking_loss(trained(batches[0]), frozen(batches[1])).backward()
    expected = _gradients(trained)
    trained.zero_grad()
    cached_contrastive_step([trained, frozen], batches, multiple_negatives_ranking_loss, micro_batch=4)
    _same(_gradients(trained), expected)


@pytest.mark.parametrize(("dropout", "wrapped"), [(0.0, False), (0.5, False), (0.5, True)])
def test_ranks_with_gathered_negatives_equal_the_single_process(dropout, wrapped):
    batches, encoder = _batches(), _encoder(dropout)
    # Each rank draws its own dropout; encoding its anchors, then its positives, part by part draws the same here.
    rows = [[], []]
    for rank, mine in enumerate((slice(0, 4), slice(4, 10))):
        torch.manual_seed(rank)
        for side, x in enumerate(batches):
            rows[side].append(torch.cat([encoder(part) for part in x[mine].split(2)]))
    whole = multiple_negatives_ranking_loss(*(torch.cat(side) for side in rows))
    whole.backward()
    expected = _gradients(encoder)

    def work(rank):
        encoder = _encoder(dropout)
        model = DistributedDataParallel(encoder) if wrapped else encoder
        mine = slice(0, 4) if rank == 0 else slice(4, 10)
        torch.manual_seed(rank)
        value = cached_contrastive_step(
            model,
            [x[mine] for x in batches],
            functools.partial(multiple_negatives_ranking_loss, all_ranks=True),
            micro_batch=2,
        )
        gradients = _gradients(encoder)
        if not wrapped:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= 2
        return value, gradients

    for value, gradients in run_ranks(work):
        torch.testing.assert_close(value, whole.detach(), rtol=1e-12, atol=0)
        _same(gradients, expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f, x: cached_contrastive_step(f, [x], torch.sum, micro_batch=0), "micro_batch must be a whole number"),
        (lambda f, x: cached_contrastive_step([f], [x, x], torch.sum), "got 1 encoders and 2 batches"),
        (lambda f, x: cached_contrastive_step(f, [], torch.sum), "got 0 encoders and 0 batches"),
        (lambda f, x: cached_contrastive_step(f, x, torch.sum), "got a single tensor"),
        (lambda f, x: cached_contrastive_step(f, [x[:0]], torch.sum), "must have one first dimension above 0"),
        (lambda f, x: cached_contrastive_step(f, [(x, x[:2])], torch.sum), "must have one first dimension above 0"),
        (lambda f, x: cached_contrastive_step(torch.sum, [x], torch.sum), "a tensor with 4 rows for 4 samples"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call(nn.Linear(3, 2), torch.ones(4, 3))
