"""GaLore against the paper's algorithm and the authors' package."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW, Chain, GaLoreAdamW, low_rank
from trimtab.optim.transform import Transform
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"rank": 2, "update_gap": 20, "weight_decay": 0.1},
    {"rank": 3, "update_gap": 7, "scale": 1.0, "proj_type": "reverse_std", "betas": (0.8, 0.95), "eps": 1e-4},
    {"rank": 2, "update_gap": 200, "proj_type": "right"},
    {"rank": 1, "update_gap": 1, "proj_type": "left"},
    {"rank": 2, "update_gap": 20, "proj_type": "full"},
]


class TestGaLoreAdamW(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        # Boundaries at steps 1, 4, 7: between saving and loading, too.
        return GaLoreAdamW(params, **{"lr": self.lr, "rank": 2, "scale": 1.0, "update_gap": 3, **options})


def _paper(streams, *, rank, update_gap, lr=0.01, scale=0.25, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, **kwargs):
    """Algorithm 2 in numpy, with Adam's bias correction, signs by the largest entry; vectors have Adam alone."""
    proj_type, (b1, b2) = kwargs.get("proj_type", "std"), betas
    ends = []
    for place, start in enumerate(streams.start()):
        w, m, v, matrix = start.numpy().copy(), 0.0, 0.0, start.ndim == 2
        for t, gradients in enumerate(streams.gradients()):
            g = gradients[place].numpy()
            left = right = None
            if matrix:
                if t % update_gap == 0:
                    u, _, vt = np.linalg.svd(g)
                    p, q = _positive(u[:, :rank]), _positive(vt[:rank].T)
                tall = g.shape[0] >= g.shape[1]
                sides = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}
                side = sides.get(proj_type, proj_type)
                left = p if side in ("left", "full") else np.eye(g.shape[0])
                right = q if side in ("right", "full") else np.eye(g.shape[1])
                g = left.T @ g @ right
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            n = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
            w = w - lr * weight_decay * w - lr * (scale * left @ n @ right.T if matrix else n)
        ends.append(torch.tensor(w))
    return ends


def _positive(vectors):
    return vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(vectors.shape[1])])


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    ours = streams.run(lambda params: GaLoreAdamW(params, **options))
    assert streams.drift(ours, _paper(streams, **options)) < 1e-9


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_equals_galore_torch(streams, options):
    peer = pytest.importorskip("galore_torch")
    own = {"rank": options["rank"], "update_proj_gap": options["update_gap"], "scale": options.get("scale", 0.25)}
    own["proj_type"] = options.get("proj_type", "std")
    adam = {name: options[name] for name in ("betas", "eps", "weight_decay") if name in options}

    def theirs(params):
        groups = [{"params": params[:2], **own}, {"params": params[2:]}]
        return peer.GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True, **adam)

    ours = streams.run(lambda params: GaLoreAdamW(params, follow="code", **options))
    assert streams.drift(ours, streams.run(theirs)) < 1e-12


def test_state_follows_the_rank_formula():
    tall, wide = nn.Parameter(torch.zeros(40, 24)), nn.Parameter(torch.zeros(24, 40))
    optimizer = GaLoreAdamW([tall, wide], rank=4)
    for p in (tall, wide):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for p in (tall, wide):  # the paper's table: m r + 2 n r for m <= n
        tensors = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() * x.element_size() for x in tensors) == 4 * (24 * 4 + 2 * 40 * 4)


def test_what_is_not_projected_has_adam():
    shapes = [(5,), (3, 4, 2), (2, 9), (6, 6)]
    ours, plain = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    groups = [{"params": ours[:3]}, {"params": ours[3:], "role": "embedding"}]
    one = GaLoreAdamW(groups, lr=0.1, rank=2, eps=1e-8)
    two = AdamW(plain, lr=0.1, weight_decay=0.0)
    for step in range(3):
        for x, y in zip(ours, plain, strict=True):
            x.grad = y.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        one.step()
        two.step()
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y)
    assert "projector_right" not in one.state[ours[3]]


def test_a_group_may_have_its_own_rank():
    a, b, c = (nn.Parameter(torch.ones(8, 8)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "rank": 1}, {"params": [c], "rank": None}]
    optimizer = GaLoreAdamW(groups, lr=0.1, rank=3)
    for p in (a, b, c):
        p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    ranks = [int(torch.linalg.matrix_rank(p.detach() - 1, rtol=1e-4)) for p in (a, b, c)]
    assert ranks[:2] == [3, 1]
    assert ranks[2] > 3


def test_a_gradient_missed_at_a_boundary_moves_the_boundary():
    p = nn.Parameter(torch.zeros(6, 6))
    other = nn.Parameter(torch.zeros(6, 6))
    optimizer = GaLoreAdamW([p, other], lr=0.1, rank=2, update_gap=3)
    bases = []
    for step in range(6):
        for x in (p, other):
            x.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        if step == 3:
            p.grad = None
        optimizer.step()
        bases.append(optimizer.state[p]["projector_right"].clone())
    changed = [not torch.equal(x, y) for x, y in itertools.pairwise(bases)]
    assert changed == [False, False, False, True, False]


class _Identity(Transform):
    def update(self, u, p, state, h):
        return u


def test_other_transforms_run_in_the_subspace():
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Chain([p], [low_rank(_Identity(), rank=2, scale=1.0)], lr=1.0).step()
    u, s, vh = torch.linalg.svd(p.grad)
    torch.testing.assert_close(p.detach(), -(u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"update_gap": 0.5}, "update_gap must be a whole number"),
        ({"scale": 0.0}, "scale must be in"),
        ({"proj_type": "up"}, "unknown projection 'up'"),
        ({"follow": "me"}, "unknown source to follow"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        GaLoreAdamW([nn.Parameter(torch.ones(3, 3))], **options)
