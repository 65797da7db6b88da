"""Future n-gram prediction against a plain loop, transformers' ProphetNet, its limits and its contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import future_ngram_loss
from trimtab.testing import LossTestCase

_N, _B, _L, _V = 3, 4, 6, 5


class TestOneStream(LossTestCase):
    """With one stream it is a loss of (logits, targets), here of rows of one token."""

    @staticmethod
    def loss(logits, targets, **options):
        flat = future_ngram_loss([logits.reshape(-1, 1, logits.shape[-1])], targets.reshape(-1, 1), **options)
        return flat.reshape(targets.shape) if options.get("reduction") == "none" else flat

    def test_wrong_arguments_are_named(self):
        """Shapes are changed on the way in: `test_arguments_are_checked` has them."""


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(_N, _B, _L, _V, generator=generator, dtype=torch.float64)
    targets = torch.randint(_V, (_B, _L), generator=generator)
    targets[0, :3] = targets[2, 4:] = -100
    return logits.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_equals_a_plain_loop(gamma, aligned):
    logits, targets = _batch()
    table, labels = logits.tolist(), targets.tolist()
    weights = [gamma**j for j in range(_N)]
    total = 0.0
    for j in range(_N):
        for b in range(_B):
            for t in range(_L):
                at = t if aligned else t + j
                if at >= _L or labels[b][at] == -100:
                    continue
                row = table[j][b][t]
                log_p = row[labels[b][at]] - math.log(sum(math.exp(value) for value in row))
                total -= weights[j] / sum(weights) * log_p
    count = sum(label != -100 for row in labels for label in row)
    found = future_ngram_loss(logits, targets, gamma=gamma, aligned=aligned)
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-12)
    assert torch.equal(future_ngram_loss(list(logits), targets, gamma=gamma, aligned=aligned), found)


@pytest.mark.parametrize("options", [{"streams": 1}, {"streams": 3, "gamma": 0.0}], ids=str)
def test_one_stream_is_cross_entropy(options):
    logits, targets = _batch()
    found = future_ngram_loss(logits[: options["streams"]], targets, gamma=options.get("gamma", 1.0))
    expected = F.cross_entropy(logits[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found, expected)
    (left,) = torch.autograd.grad(found, logits)
    (right,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(left, right)


def test_streams_see_only_their_own_targets():
    """The gradient of stream j at t depends on the target at t + j alone: no leakage, no wrap-around."""
    logits, targets = _batch()
    targets = targets.clamp(min=0)

    def gradient(labels):
        return torch.autograd.grad(future_ngram_loss(logits, labels), logits, retain_graph=True)[0]

    changed = targets.clone()
    changed[1, 3] = (changed[1, 3] + 1) % _V
    touched = (gradient(changed) - gradient(targets)).abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[j, 1, 3 - j] for j in range(_N)]
    for j in range(_N):
        assert not gradient(targets)[j, :, _L - j :].any()


def test_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ProphetNetConfig(
        vocab_size=19, hidden_size=8, num_decoder_layers=1, num_decoder_attention_heads=2, decoder_ffn_dim=8,
        max_position_embeddings=16, ngram=2, num_buckets=4, relative_max_distance=8, is_decoder=True,
        add_cross_attention=False, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ProphetNetForCausalLM(config).eval()
    tokens = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=tokens, labels=labels)
    streams = (
        [out.logits, *out.logits_ngram.unbind(1)] if out.logits_ngram.dim() == 4 else [out.logits, out.logits_ngram]
    )
    found = future_ngram_loss(streams, labels, aligned=True)
    torch.testing.assert_close(found, out.loss, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up():
    logits, targets = _batch()
    (whole,) = torch.autograd.grad(future_ngram_loss(logits, targets, gamma=0.5), logits)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        leaf = logits.detach()[:, rows].clone().requires_grad_()
        loss = future_ngram_loss(leaf, targets[rows], gamma=0.5, denominator=int((targets >= 0).sum()))
        parts += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_in_float32_or_better(dtype):
    logits, targets = _batch(dtype)
    loss = future_ngram_loss(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), future_ngram_loss(logits.double(), targets), rtol=1e-5, atol=1e-6)


def test_short_rows_and_nothing_to_learn_from():
    logits, targets = _batch()
    assert future_ngram_loss(logits[:, :, :1], targets[:, :1]).isfinite()
    for x, y in [(logits, torch.full_like(targets, -100)), (logits[:, :0], targets[:0])]:
        loss = future_ngram_loss(x, y)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0
        assert not gradient.any()


def test_arguments_are_checked():
    logits, targets = _batch()
    with pytest.raises(UsageError, match="gamma must be at least 0"):
        future_ngram_loss(logits, targets, gamma=-1)
    with pytest.raises(UsageError, match="logits must hold one stream"):
        future_ngram_loss([], targets)
    with pytest.raises(UsageError, match="do not fit logits"):
        future_ngram_loss(logits, targets[:, :-1])
