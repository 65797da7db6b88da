"""muP against the authors' package: initialisation, rates of each parameter, logits after ten steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.layers import apply_mup, mup_param_groups

_BASE, _WIDTH, _HEADS = 16, 48, 2


class _MLP(nn.Module):
    def __init__(self, width, readout=nn.Linear, base=0):
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 2 * width)
        self.head = readout(2 * width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class _Attention(nn.Module):
    """A block with separate projections; with the package's readout it writes 1 / d into its attention itself."""

    def __init__(self, width, readout=nn.Linear, base=0):
        super().__init__()
        self.num_heads = _HEADS
        self.embed, self.norm = nn.Linear(8, width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out, self.head = nn.Linear(width, width, bias=False), readout(width, 3)
        head_dim = width // _HEADS
        self.scale = math.sqrt(base // _HEADS) / head_dim if base else None

    def forward(self, x):
        h = self.embed(x)
        q, k, v = (
            part(self.norm(h)).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.head(h + self.out(y.transpose(1, 2).flatten(-2)))


def _filled(model):
    """Give a model the same deterministic weights whatever its class: those of fan-in initialisation in size."""
    fan_in = 1
    with torch.no_grad():
        for place, (name, p) in enumerate(model.named_parameters()):
            if "norm" in name:
                continue
            fan_in = p.shape[1] if p.ndim > 1 else fan_in
            values = torch.sin(1.7 * torch.arange(p.numel(), dtype=torch.float64) ** 1.1 + place)
            p.copy_(values.view_as(p) / math.sqrt(fan_in))
    return model


def _built(kind, **options):
    return _filled(kind(_WIDTH, **options).double())


def _trained(model, optimizer):
    inputs = torch.sin(3.1 * torch.arange(4 * 5 * 8, dtype=torch.float64)).view(4, 5, 8)
    targets = (torch.arange(20) % 3).view(4, 5)
    first = model(inputs).detach()
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    return first, model(inputs).detach()


def _ours(kind, optimizer):
    model = _built(kind)
    apply_mup(model, kind(_BASE), init="fan_in")
    lr, decay = (0.02, 0.1) if optimizer == "adam" else (0.1, 0.01)
    groups = mup_param_groups(model, lr=lr, optimizer=optimizer, weight_decay=decay)
    made = torch.optim.AdamW(groups, lr=lr) if optimizer == "adam" else torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return model, made


def _theirs(mup, kind, optimizer):
    options = {"readout": mup.MuReadout, "base": _BASE}
    model = _built(kind, **options)
    mup.set_base_shapes(model, kind(_BASE, **options))
    if optimizer == "adam":
        return model, mup.MuAdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    return model, mup.MuSGD(model.parameters(), lr=0.1, weight_decay=0.01, momentum=0.9)


def _rates(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", [_MLP, _Attention])
def test_equals_the_mup_package(kind, optimizer):
    mup = pytest.importorskip("mup")
    ours, theirs = _ours(kind, optimizer), _theirs(mup, kind, optimizer)
    for name, p in theirs[0].named_parameters():
        torch.testing.assert_close(ours[0].get_parameter(name), p, rtol=1e-12, atol=0)
    expected = _rates(*theirs)
    for name, (lr, decay) in _rates(*ours).items():
        assert (lr, decay) == pytest.approx(expected[name], rel=1e-12), name
    for one, other in zip(_trained(*ours), _trained(*theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


# First logits of the last sample after ten steps, and the sum of squares of all, as mup 1.0.0 gives them.
_GAVE = {
    ("_MLP", "adam"): (0.6155805025014333, 0.21002392643852708, -0.5102110104449773, 6.244056038289937),
    ("_MLP", "sgd"): (0.1783815197250292, 0.19327862209510144, -0.11665748030251674, 1.2747319643624242),
    ("_Attention", "adam"): (-1.2339522025457477, 0.9440052795347265, -0.3822145262151134, 14.874865631965712),
    ("_Attention", "sgd"): (-0.7548336264929647, 0.484243175371149, -0.2646286386213826, 8.224520408618076),
}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", [_MLP, _Attention])
def test_equals_what_the_mup_package_gave(kind, optimizer):
    _, logits = _trained(*_ours(kind, optimizer))
    *last, squares = _GAVE[kind.__name__, optimizer]
    assert logits[-1, -1].tolist() == pytest.approx(last, rel=1e-8)
    assert float(logits.square().sum()) == pytest.approx(squares, rel=1e-8)


@pytest.mark.parametrize("shape", [(48, 32), (10, 32), (48, 8)])
@pytest.mark.parametrize("law", ["normal_", "xavier_uniform_", "kaiming_normal_"])
def test_rescaled_initialisation_is_that_of_mup_init(law, shape):
    """mup.init draws what our factor makes of the same numbers drawn by torch."""
    mup = pytest.importorskip("mup")
    base_shape = tuple({48: 24, 32: 16}.get(size, size) for size in shape)
    ours, theirs = nn.Linear(*shape[::-1], bias=False), nn.Linear(*shape[::-1], bias=False)
    for p in theirs.parameters():
        p.infshape = mup.zip_infshape(base_shape, shape)
    options = {"std": 0.02} if law == "normal_" else {}
    torch.manual_seed(3)
    getattr(nn.init, law)(ours.weight, **options)
    torch.manual_seed(3)
    getattr(mup.init, law)(theirs.weight, **options)
    apply_mup(ours, nn.Linear(*base_shape[::-1], bias=False, device="meta"), attention=False)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-7)
