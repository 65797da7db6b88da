"""The three parts of Swin V2 put together equal timm's window attention and block, weight for weight."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers import CosineAttention, LogCPB, ResidualBlock, scaled_cosine_attention
from trimtab.remedy import apply


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (nn.Module,), {})


class _Stand(types.ModuleType):
    """A module that has every class."""

    __getattr__ = _Anything.__getattr__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, of which timm's transformers use nothing, while timm is imported."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stand(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm_models():
    """Return timm's modules of Swin V2 and ViT."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    names = ("timm.models.swin_transformer_v2", "timm.models.vision_transformer")
    if importlib.util.find_spec("torchvision") is not None:
        return [importlib.import_module(name) for name in names]
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in names]
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


def _window_attention(timm_models, window=(3, 4), trained=(0, 0)):
    torch.manual_seed(0)
    attention = timm_models[0].WindowAttention(12, window, 3, pretrained_window_size=trained)
    for name, parameter in attention.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    attention.logit_scale.data.copy_(torch.tensor([0.0, 2.0, 9.0]).view(3, 1, 1))  # the last is above log(100)
    return attention


def _ours(theirs, window, trained=None):
    bias = LogCPB(window, 3, trained_window=trained)
    layer = CosineAttention(12, 3, position_bias=bias)
    layer.qkv.weight.data.copy_(theirs.qkv.weight)
    layer.qkv.bias.data.copy_(torch.cat([theirs.q_bias, theirs.k_bias, theirs.v_bias]))
    layer.logit_scale.data.copy_(theirs.logit_scale.flatten())
    layer.proj.load_state_dict(theirs.proj.state_dict())
    bias.network.load_state_dict(theirs.cpb_mlp.state_dict())
    return layer


@pytest.mark.parametrize(("window", "trained"), [((3, 4), None), ((4, 4), (2, 3)), ((1, 5), None)])
def test_window_attention_equals_timm(timm_models, window, trained):
    theirs = _window_attention(timm_models, window, trained or (0, 0))
    ours = _ours(theirs, window, trained)
    x = torch.randn(5, math.prod(window), 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_gradients_equal_timm(timm_models):
    theirs = _window_attention(timm_models)
    ours = _ours(theirs, (3, 4))
    x = torch.randn(5, 12, 12)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    pairs = [
        (ours.logit_scale.grad, theirs.logit_scale.grad.flatten()),
        (ours.qkv.weight.grad, theirs.qkv.weight.grad),
        (ours.position_bias.network[0].weight.grad, theirs.cpb_mlp[0].weight.grad),
    ]
    for mine, its in pairs:
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)


def test_shifted_windows_equal_timm(timm_models):
    """The mask of shifted windows is added to the bias: [windows, 1, L, L] + [H, L, L]."""
    theirs = _window_attention(timm_models, (2, 2))
    ours = _ours(theirs, (2, 2))
    mask = torch.where(torch.rand(3, 4, 4) < 0.3, -100.0, 0.0)
    x = torch.randn(6, 4, 12)  # two images of three windows
    q, k, v = ours.qkv(x).view(6, 4, 3, 3, 4).permute(2, 0, 3, 1, 4)
    bias = ours.position_bias() + mask.repeat(2, 1, 1)[:, None]
    y = scaled_cosine_attention(q, k, v, ours.logit_scale, bias=bias)
    torch.testing.assert_close(ours.proj(y.transpose(1, 2).flatten(-2)), theirs(x, mask), atol=1e-5, rtol=1e-5)


def test_block_equals_timm(timm_models):
    """One window that fills the image: x + N(attention(x)), then x + N(mlp(x))."""
    torch.manual_seed(0)
    block = timm_models[0].SwinTransformerV2Block(12, (4, 4), 3, window_size=4, mlp_ratio=2.0)
    for part in (block.norm1, block.norm2):
        part.weight.data.normal_()
        part.bias.data.normal_()
    attention = ResidualBlock(12, _ours(block.attn, (4, 4)), "res-post")
    mlp = ResidualBlock(12, block.mlp, "res-post")
    attention.output_norm.load_state_dict(block.norm1.state_dict())
    mlp.output_norm.load_state_dict(block.norm2.state_dict())
    x = torch.randn(2, 4, 4, 12)
    expected = block(x).flatten(1, 2)
    torch.testing.assert_close(mlp(attention(x.flatten(1, 2))), expected, atol=1e-5, rtol=1e-5)


def test_vit_becomes_a_swin_v2(timm_models):
    """All three methods in timm's ViT: names of what changed, and the outputs are the composed equation's."""
    torch.manual_seed(0)
    vit = timm_models[1].VisionTransformer(
        img_size=8,
        patch_size=2,
        embed_dim=12,
        depth=1,
        num_heads=3,
        num_classes=0,
        global_pool="avg",
        class_token=False,
    )
    assert list(apply(vit, "cosine-attention").changes) == ["blocks.0.attn"]
    assert list(apply(vit, "log-cpb", window=(4, 4)).changes) == ["blocks.0.attn"]
    assert list(apply(vit, "res-post-norm", gain=1.0).changes) == ["blocks.0.attn", "blocks.0.mlp"]
    block, x = vit.blocks[0], torch.randn(2, 16, 12)
    q, k, v = block.attn.qkv(x).view(2, 16, 3, 3, 4).permute(2, 0, 3, 1, 4)
    logits = 10 * F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1) + block.attn.position_bias()
    y = block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    y = x + F.layer_norm(y, (12,), eps=1e-6)
    expected = y + F.layer_norm(block.mlp.fc2(F.gelu(block.mlp.fc1(y))), (12,), eps=1e-6)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_pre_norm_names_of_post_norm_blocks_are_not_taken(timm_models):
    """timm's Swin V2 block has the names of a pre-norm block: nothing may be changed in it."""
    block = timm_models[0].SwinTransformerV2Block(12, (4, 4), 3, window_size=4)
    for method in ("res-post-norm", "peri-ln"):
        with pytest.raises(UsageError, match="no pre-norm block was found"):
            apply(block, method)
