"""Lossless expansion: the function stays, the copies differ, and they part in training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import lossless_expand
from trimtab.remedy import apply
from trimtab.schedule import GrowthSchedule
from trimtab.workloads.digits import VisionTransformer
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.transformer import Block, CausalSelfAttention


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _perturb(model, seed=0):
    """Move every parameter away from its initial value, norms and biases among them, as training would."""
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def _language_model(dtype=torch.float64, tied=True, layers=2):
    torch.manual_seed(0)
    model = LanguageModel(16, 8, layers=layers).to(dtype)
    if not tied:
        model.head.weight = nn.Parameter(torch.randn(256, 16, dtype=dtype, generator=_generator(1)))
    return _perturb(model)


TOKENS = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("width", "depth"), [(32, None), (24, None), (16, 3), (None, 4), (28, 3), (48, 2), (40, 7)])
def test_language_model_keeps_its_logits(width, depth, tied):
    model = _language_model(tied=tied)
    before = copy.deepcopy(model.state_dict())
    larger = lossless_expand(model, width=width, depth=depth)
    expected, got = model(TOKENS), larger(TOKENS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert larger.norm.normalized_shape == (width or 16,)
    assert len(larger.blocks) == (depth or 2)
    assert larger.blocks[0].attention.num_heads == (width or 16) // 4
    assert larger.blocks[0].mlp[0].weight.shape == (4 * (width or 16), width or 16)
    assert (larger.head.weight is larger.embedding.weight) == tied
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_float32_too():
    model = _language_model(torch.float32)
    larger = lossless_expand(model, width=28, depth=3, example=TOKENS)
    torch.testing.assert_close(larger(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    assert {p.dtype for p in larger.parameters()} == {torch.float32}


@pytest.mark.parametrize("width", [16, 24, 40])
def test_vision_transformer_keeps_its_logits(width):
    torch.manual_seed(0)
    model = _perturb(VisionTransformer(16, 2).double()).eval()
    pixels = torch.randn(3, 64, generator=_generator(), dtype=torch.float64)
    larger = lossless_expand(model, width=width, depth=3, example=pixels)
    torch.testing.assert_close(larger(pixels), model(pixels), rtol=0, atol=1e-12)
    assert larger.patch.out_features == larger.position.embedding_dim == width


class Named(nn.Module):
    """A block and a model with timm's names, biases, bare parameters and a choice of norm."""

    class Mlp(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(width, 20), nn.Linear(20, width)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self, width, norm):
            super().__init__()
            self.norm1, self.norm2 = norm(width), norm(width)
            self.attn = CausalSelfAttention(width, 2)
            self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = Named.Mlp(width)

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def __init__(self, width=8, norm=nn.LayerNorm):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.Sequential(*(Named.Block(width, norm) for _ in range(2)))
        self.norm = norm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("width", [16, 12, 28])
def test_timm_names_and_root_mean_square_norms(width, norm):
    torch.manual_seed(0)
    model = _perturb(Named(norm=norm).double()).eval()
    images = torch.randn(4, 1, 4, 4, generator=_generator(), dtype=torch.float64)
    larger = lossless_expand(model, width=width, depth=3)
    torch.testing.assert_close(larger(images), model(images), rtol=0, atol=1e-12)
    assert not larger.training
    assert larger.blocks[0].mlp.fc1.out_features == 20 * width / 8


@pytest.mark.parametrize(("width", "depth"), [(4, None), (7, None), (9, None)])
def test_plain_mlp_keeps_its_function(width, depth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 5, generator=_generator(), dtype=torch.float64)
    larger = lossless_expand(model, width=width, depth=depth)
    torch.testing.assert_close(larger(x), model(x), rtol=0, atol=1e-12)
    assert [part.weight.shape for part in larger if isinstance(part, nn.Linear)] == [
        (width, 5),
        (width, width),
        (2, width),
    ]


@pytest.mark.parametrize("width", [8, 11, 16, 20])
def test_layer_norm_is_the_papers(width):
    """mu' = eta Vzero(mu), b' = Vzero(b), eps' = eta^2 eps on x' = Vavg(x): the norm of x, zero-padded."""
    model = _language_model(tied=False)
    norm = nn.LayerNorm(8).double()
    _perturb(norm)
    norm.eps = 0.3  # not negligible, so that its scale shows
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(8, CausalSelfAttention(8, 8))]).double()
    model.blocks[0].norm1 = norm
    larger = lossless_expand(model, width=width)
    x = np.random.default_rng(0).normal(size=(3, 8))
    copies, rest = divmod(width, 8)
    expanded = np.concatenate([x] * copies + [np.repeat(x.mean(1, keepdims=True), rest, 1)], 1)
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.3)
    normal = normal * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    expected = np.concatenate([normal] * copies + [np.zeros((3, rest))], 1)
    got = larger.blocks[0].norm1(torch.from_numpy(expanded)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert larger.blocks[0].norm1.eps == pytest.approx(0.3 * copies * 8 / width)


def test_copies_differ_and_add_up():
    model = _language_model()
    larger = lossless_expand(model, width=40)  # two copies of the stream, and half of one
    old, new = model.blocks[0], larger.blocks[0]
    read = new.mlp[0].weight[:64]
    torch.testing.assert_close(read[:, :16] + read[:, 16:32], old.mlp[0].weight, rtol=0, atol=1e-12)
    assert (read[:, :16] - read[:, 16:32]).abs().mean() > 0.01
    # Hidden neurons: 64 became 160, so that the first 32 have three copies and the others two.
    write = new.mlp[2].weight[:16]
    sums = torch.stack([write[:, i::64].sum(1) for i in range(64)], 1)
    torch.testing.assert_close(sums, old.mlp[2].weight, rtol=0, atol=1e-12)
    assert (write[:, :32] - write[:, 64:96]).abs().mean() > 0.01
    even = lossless_expand(model, width=32, std=0.0).blocks[0].mlp[0].weight
    assert torch.equal(even[:, :16], even[:, 16:])


def _train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(TOKENS[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    return loss


def _distance(model):
    """Return how far two copies of the same neurons are from each other in what they compute."""
    rows = model.blocks[0].mlp[0].weight.detach()
    inputs = torch.cat([torch.eye(16, dtype=torch.float64)] * 2, 1)
    return ((rows[:64] - rows[64:]) @ inputs.T).abs().max()


def test_duplicated_neurons_part_in_training():
    model = _language_model()
    for std, parts in ((0.02, True), (0.0, False)):
        larger = lossless_expand(model, width=32, std=std)
        assert _distance(larger) < 1e-12
        _train(larger, 3)
        assert (_distance(larger) > 1e-4) == parts


def test_new_blocks_are_silent_and_learn():
    model = _language_model(layers=3)
    larger = lossless_expand(model, depth=5)
    silent = [not block.mlp[2].weight.any() and not block.attention.proj.weight.any() for block in larger.blocks]
    # The first stays alone, the two others are each followed by a new one.
    assert silent == [False, False, True, False, True]
    assert torch.equal(larger.blocks[1].mlp[0].weight, larger.blocks[2].mlp[0].weight)
    first = _train(larger, 1)
    assert _train(larger, 10) < first
    assert larger.blocks[2].mlp[2].weight.any()
    assert larger.blocks[2].attention.proj.weight.any()


def test_training_goes_on_without_a_bump():
    model = _language_model()
    _train(model, 20)
    larger = lossless_expand(model, width=32, depth=3)
    after = _train(larger, 1)
    torch.testing.assert_close(after, _train(copy.deepcopy(model), 1), rtol=0, atol=1e-12)
    assert _train(larger, 10) < after


def test_grows_in_the_middle_of_a_run():
    schedule = GrowthSchedule(
        {2: lambda model: lossless_expand(model, width=24, depth=3)},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
    )
    model = _language_model()
    optimizer, logits = schedule.make_optimizer(model), []
    for _ in range(4):
        model, optimizer = schedule.step(model, optimizer)
        logits.append(model(TOKENS))
    assert model.norm.normalized_shape == (24,)
    torch.testing.assert_close(logits[3], logits[0], rtol=0, atol=1e-12)


def test_deterministic_in_the_seed():
    model = _language_model()
    state = torch.get_rng_state()
    first, second, third = (lossless_expand(model, width=32, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp.0.weight"], third["blocks.0.mlp.0.weight"])


def test_frozen_parameters_stay_frozen():
    model = _language_model()
    model.position.requires_grad_(False)
    larger = lossless_expand(model, width=32)
    assert not larger.position.weight.requires_grad
    assert larger.embedding.weight.requires_grad


class PostNorm(LanguageModel):
    """Not the structure that the names suggest: a norm behind the blocks writes to the stream."""

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_example_finds_a_structure_that_is_not_what_it_seems():
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"differs by .* on the example"):
        lossless_expand(_perturb(PostNorm(16, 8, layers=1)), width=24, example=TOKENS)


_SHARED = nn.Linear(3, 3)


def test_a_check_leaves_the_modes_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2), nn.Softmax(-1))
    model[2].eval()
    larger = lossless_expand(model, width=5, example=torch.ones(1, 3))
    for one in (model, larger):
        assert [part.training for part in one.modules()] == [True, True, True, False, True, True]


def _with(change):
    model = _language_model()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (_language_model(), {"width": 30}, "a multiple of the heads' width 4 and at least 16, got 30: the next is 32"),
        (_language_model(), {"width": 8}, "got 8: the next is 16"),
        (_language_model(), {"depth": 1}, "depth must be at least 2"),
        (_language_model(), {"std": -1.0}, "std must be at least 0"),
        (nn.Linear(3, 3), {"width": 8}, "nothing to expand in Linear. Looked for a ModuleList"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"width": 2}, "width must be at least 3"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"depth": 4}, "a plain MLP has none"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)), {"width": 6}, "a LayerNorm in a plain MLP"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1), nn.Linear(3, 3)),
            {"width": 6},
            "a Softmax over hidden neurons",
        ),
        (nn.Sequential(_SHARED, nn.ReLU(), _SHARED, nn.Linear(3, 3)), {"width": 6}, "whose layers share a weight"),
        (nn.Linear(3, 3, device="meta"), {"width": 6}, "on the meta device"),
        (
            _with(lambda model: model.blocks[1].register_parameter("gamma", nn.Parameter(torch.ones(16)))),
            {"width": 32},
            "blocks.1.gamma is not known to be lossless to expand",
        ),
        (
            _with(lambda model: setattr(model, "extra", nn.Linear(16, 16))),
            {"width": 32},
            "extra.weight of shape .16, 16. is not known to be lossless",
        ),
        (
            _with(lambda model: setattr(model, "norm", nn.LayerNorm(16, elementwise_affine=False))),
            {"width": 24},
            "norm has no gain, so that its output cannot be scaled: widen to a multiple of 16",
        ),
        (
            _with(lambda model: setattr(model, "norm", nn.RMSNorm(16))),
            {"width": 24},
            "both LayerNorm and RMSNorm read",
        ),
        (
            _with(lambda model: setattr(model, "norm", nn.Identity())),
            {"width": 24},
            "a head tied to the embedding needs one norm before it, found 0",
        ),
        (_with(lambda model: apply(model, "sigma-reparam")), {"width": 24}, "the model has parametrized weights"),
        (
            _with(lambda model: setattr(model.blocks[0], "mlp", nn.Linear(16, 16))),
            {"width": 24},
            "blocks.0 is no pre-LN block",
        ),
    ],
)
def test_what_cannot_be_expanded_is_named(model, options, text):
    with pytest.raises(UsageError, match=text):
        lossless_expand(model, **options)
