"""Aside adapters against their equations, in models that they leave as they were and freeze."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import AsideAdapter
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase
from trimtab.workloads import workload
from trimtab.workloads.transformer import Block, CausalSelfAttention


class Stack(nn.Module):
    def __init__(self, depth=3, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, CausalSelfAttention(width, 2)) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def _changed(depth=3, **options):
    model = Stack(depth)
    apply(model, "aside-adapters", **{"rank": 4, **options})
    for part in model.modules():
        if isinstance(part, AsideAdapter):
            nn.init.normal_(part.up.weight, 0.0, 0.3)
            if part.link is not None:
                nn.init.normal_(part.link.weight, 0.0, 0.5)
    return model


def _input(samples=2):
    return torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(7))


class TestConnected(LayerTestCase):
    unused = tuple(name for name, _ in Stack(2).named_parameters())

    def layer(self):
        return _changed(depth=2)

    def inputs(self, samples):
        return (_input(4)[:samples],)


@pytest.mark.parametrize("connected", [True, False])
def test_equals_the_equations(connected):
    model, x = _changed(connected=connected).double(), _input().double()
    h, s = x, 0
    for block in model.blocks:
        adapter = block.aside_adapter
        h = h + block.attention(block.norm1(h))
        h = h + block.mlp(block.norm2(h))
        z = h @ adapter.down.weight.T
        here = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        s = here + s @ adapter.link.weight.T if adapter.link is not None else here
        h = h + s @ adapter.up.weight.T
    assert [block.aside_adapter.link is not None for block in model.blocks] == [False, connected, connected]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), h)


@pytest.mark.parametrize("name", ["lm-small", "digits-vit"])
def test_function_is_unchanged_and_the_rest_frozen(name):
    job = workload(name)
    model = job.model(0).eval()
    x = job.batch(0, 0, 4)[0]
    before, text = model(x), repr(model)
    changes = apply(model, "aside-adapters").changes
    assert torch.equal(model(x), before)
    assert list(changes) == [f"blocks.{i}" for i in range(job.depth)]
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    assert all("aside_adapter" in key for key in trained)
    assert sum(trained.values()) == job.depth * 2 * 16 * job.width + (job.depth - 1) * 16**2
    assert "adapter of rank 16, joined to the one before" in changes["blocks.1"]
    with pytest.raises(UsageError, match="it has adapters already"):
        apply(model, "aside-adapters")
    remove(model, "aside-adapters")
    assert repr(model) == text
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), before)


def test_what_was_frozen_before_stays_so():
    model = Stack()
    model.blocks[0].norm1.requires_grad_(False)
    apply(model, "aside-adapters")
    remove(model, "aside-adapters")
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
    }


def test_the_path_aside_carries_gradient():
    """With every way through the frozen model cut, the first adapter still learns from the last one's output."""

    class Cut(Block):
        def forward(self, x):
            return super().forward(x).detach()

    def gradient(connected):
        model = Stack()
        model.blocks = nn.ModuleList(Cut(8, CausalSelfAttention(8, 2)) for _ in range(3))
        apply(model, "aside-adapters", rank=4, connected=connected)
        nn.init.normal_(model.blocks[2].aside_adapter.up.weight)
        model(_input()).square().sum().backward()
        found = model.blocks[0].aside_adapter.down.weight.grad
        return 0.0 if found is None else float(found.abs().max())

    assert gradient(connected=False) == 0
    assert gradient(connected=True) > 0


def test_nothing_is_left_from_an_interrupted_pass():
    model, x = _changed(), _input()
    expected = model(x)
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x + 1)
    handle.remove()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_a_copy_remembers_what_was_frozen():
    model = Stack()
    apply(model, "aside-adapters")
    copied = copy.deepcopy(model)
    remove(copied, "aside-adapters")
    assert all(p.requires_grad for p in copied.parameters())


def test_the_width_is_not_that_of_a_norm_inside_the_attention():
    class Normed(Block):
        def __init__(self):
            super().__init__(8, CausalSelfAttention(8, 2))
            self.attention.q_norm = nn.LayerNorm(4)
            self._modules = {"attention": self.attention, **self._modules}  # first, before the block's own norms

    model = nn.Sequential(Normed(), Normed())
    before = model(_input())
    apply(model, "aside-adapters", rank=2)
    assert [block.aside_adapter.width for block in model] == [8, 8]
    assert torch.equal(model(_input()), before)


def test_stages_of_other_widths_have_their_own_paths():
    class Stage(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.blocks = nn.ModuleList(Block(width, CausalSelfAttention(width, 2)) for _ in range(2))
            self.merge = nn.Linear(width, 2 * width)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.merge(x)

    model = nn.Sequential(Stage(8), Stage(16))
    before = model(_input())
    assert list(apply(model, "aside-adapters", rank=2).changes) == [
        f"{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)
    ]
    assert torch.equal(model(_input()), before)


def test_other_transformers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train()
    before = model(_input())
    assert list(apply(model, "aside-adapters", rank=2).changes) == ["layers.0", "layers.1", "layers.2"]
    torch.testing.assert_close(model(_input()), before)
    nn.init.normal_(model.layers[0].aside_adapter.up.weight)
    assert not torch.allclose(model(_input()), before)


def test_hidden_states_in_a_tuple():
    class Paired(Block):
        def forward(self, x):
            return super().forward(x), "attention weights"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Paired(8, CausalSelfAttention(8, 2)) for _ in range(2)))

        def forward(self, x):
            for layer in self.layers:
                x, _ = layer(x)
            return x

    model = Model()
    before = model(_input())
    apply(model, "aside-adapters", rank=2)
    assert torch.equal(model(_input()), before)
    nn.init.normal_(model.layers[1].aside_adapter.up.weight)
    assert not torch.allclose(model(_input()), before)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "aside-adapters"), "none was found"),
        (lambda: apply(Stack(), "aside-adapters", rank=0), "rank must be at least 1, got 0"),
        (lambda: AsideAdapter(8, 0), "rank must be at least 1, got 0"),
        (lambda: AsideAdapter(8, 3, previous=AsideAdapter(8, 2)), "that of the adapter before, 2, got 3"),
        (lambda: remove(Stack(), "aside-adapters"), "nothing to remove"),
    ],
)
def test_wrong_use_is_named(call, text):
    with pytest.raises(UsageError, match=text):
        call()
