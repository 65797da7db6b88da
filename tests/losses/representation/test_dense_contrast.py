"""DenseCL against loops in NumPy over images and places, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import UsageError
from trimtab.losses import dense_contrastive_loss, match_places

_SHAPES = {
    "queries": (3, 4),
    "keys": (3, 4),
    "dense_queries": (3, 4, 5),
    "dense_keys": (3, 4, 6),
    "features": (3, 7, 5),
    "key_features": (3, 7, 6),
    "queue": (8, 4),
    "dense_queue": (9, 4),
}


def _inputs(dtype=torch.float64, queues=True):
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in _SHAPES.items()}
    return {name: x.to(dtype) for name, x in drawn.items() if queues or "queue" not in name}


def _cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def _nce(row, key, negatives, temperature):
    scores = np.array([_cosine(row, other) for other in [key, *negatives]]) / temperature
    return np.log(np.exp(scores).sum()) - scores[0]


def _numpy_values(given, weight, temperature):
    x = {name: value.numpy() for name, value in given.items()}
    values = []
    for b in range(len(x["queries"])):
        others = [i for i in range(len(x["queries"])) if i != b]
        queue = x.get("queue", x["keys"][others])
        dense_queue = x.get("dense_queue", x["dense_keys"].mean(2)[others])
        dense = []
        for s in range(x["features"].shape[2]):
            like = [_cosine(x["features"][b, :, s], other) for other in x["key_features"][b].T]
            match = x["dense_keys"][b, :, int(np.argmax(like))]
            dense.append(_nce(x["dense_queries"][b, :, s], match, dense_queue, temperature))
        whole = _nce(x["queries"][b], x["keys"][b], queue, temperature)
        values.append((1 - weight) * whole + weight * np.mean(dense))
    return np.array(values)


@pytest.mark.parametrize("queues", [True, False])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 0.2), (0.0, 1.0), (1.0, 0.5)])
def test_equals_numpy(queues, weight, temperature):
    given = _inputs(queues=queues)
    found = dense_contrastive_loss(**given, weight=weight, temperature=temperature, reduction="none")
    np.testing.assert_allclose(found.numpy(), _numpy_values(given, weight, temperature), rtol=1e-10)


def test_places_are_matched_by_features():
    features = torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    # Lengths do not matter: the matched place is the one that points the same way.
    moved = features[:, :, order] * torch.linspace(0.1, 5, 9)
    torch.testing.assert_close(match_places(features, moved), order.argsort().expand(2, 9))


def test_gradient_goes_into_queries_alone():
    given = {name: x.requires_grad_() for name, x in _inputs().items()}
    dense_contrastive_loss(**given).backward()
    assert {name for name, x in given.items() if x.grad is not None} == {"queries", "dense_queries"}
    # The closed form for one global query of length 1: across it, (sum_c p_c k_c - k) / tau.
    q = torch.nn.functional.normalize(given["queries"][0].detach(), dim=0).requires_grad_()
    dense_contrastive_loss(
        q.unsqueeze(0), *(given[name][:1] for name in list(_SHAPES)[1:6]), given["queue"], weight=0.0
    ).backward()
    keys = [given["keys"][0], *given["queue"]]
    unit = np.stack([k.detach().numpy() / np.linalg.norm(k.detach().numpy()) for k in keys])
    vector = q.detach().numpy()
    share = np.exp(unit @ vector / 0.2)
    expected = ((share / share.sum()) @ unit - unit[0]) / 0.2
    expected -= expected @ vector * vector
    np.testing.assert_allclose(q.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("queues", [True, False])
def test_gradcheck(queues):
    given = _inputs(queues=queues)
    leaves = [given.pop(name).requires_grad_() for name in ("queries", "dense_queries")]
    assert torch.autograd.gradcheck(
        lambda q, r: dense_contrastive_loss(queries=q, dense_queries=r, **given, reduction="none"), leaves
    )


def test_micro_batches_add_up_with_queues():
    given = _inputs()
    whole = dense_contrastive_loss(**given)
    queues = {name: given.pop(name) for name in ("queue", "dense_queue")}
    parts = [
        dense_contrastive_loss(**{name: x[rows] for name, x in given.items()}, **queues, denominator=3)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)
    each = dense_contrastive_loss(**given, **queues, reduction="none")
    torch.testing.assert_close(dense_contrastive_loss(**given, **queues, reduction="sum"), each.sum())
    torch.testing.assert_close(whole, each.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_computed_in_float32_or_better(dtype):
    given = _inputs(dtype)
    given["queries"].requires_grad_()
    loss = dense_contrastive_loss(**given)
    assert loss.dtype == torch.float32
    exact = dense_contrastive_loss(**{name: x.detach().double() for name, x in given.items()})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert given["queries"].grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(dense_contrastive_loss(**given), loss)


def test_dense_embeddings_may_have_a_width_of_their_own():
    given = _inputs()
    wider = {name: F.pad(given[name], (0, 0, 0, 2)) for name in ("dense_queries", "dense_keys")}
    wider["dense_queue"] = F.pad(given["dense_queue"], (0, 2))
    torch.testing.assert_close(dense_contrastive_loss(**{**given, **wider}), dense_contrastive_loss(**given))


def test_edge_batches():
    nothing = {name: x[:0] for name, x in _inputs(queues=False).items()}
    assert dense_contrastive_loss(**nothing).item() == 0
    one = {name: x[:1] for name, x in _inputs(queues=False).items()}
    one["queries"].requires_grad_()
    alone = dense_contrastive_loss(**one)
    alone.backward()
    assert alone.item() == 0, "one image without a queue has no negatives"
    assert not one["queries"].grad.any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": 2.0}, "weight must be at least 0 and at most 1, got 2.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"features": torch.zeros(3, 7, 4)}, "features and dense embeddings must have the same places, got 4 and 6"),
        ({"features": torch.zeros(2, 7, 5)}, "must be of the same images"),
        ({"key_features": torch.zeros(3, 6, 6)}, "features must be .* of the same images"),
        ({"dense_keys": torch.zeros(3, 4)}, "dense embeddings must be"),
        ({"queue": torch.zeros(3, 5)}, "must have one width, got 4 and, for queue, 5"),
        ({"dense_queue": torch.zeros(3, 5)}, "must have one width, got 4 and, for dense_queue, 5"),
        ({"keys": torch.zeros(2, 4)}, "must be of the same images"),
    ],
)
def test_wrong_arguments(change, text):
    with pytest.raises(UsageError, match=text):
        dense_contrastive_loss(**{**_inputs(), **change})
