"""What each layer costs against its plain counterpart: CPU time of forward and backward, and peak memory.

    python benchmarks/layers.py [--repetitions 9] [--only NAME ...]

Both sides take turns on one thread, so a slow spell falls on both. Memory is the peak of the bytes that the tensors
made by forward and backward hold at once, without parameters and inputs. Where a method is applied to a model, the
counterpart is the same model without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _common import interleaved, one_thread, ratio, write
from torch import Tensor, nn

import trimtab
from trimtab import layers
from trimtab.layers._self_attention import SelfAttention
from trimtab.studies._memory import PeakMemory

BATCH, LENGTH, WIDTH, HEADS = 4, 512, 256, 8
Side = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A method's layer and what it is held against."""

    method: str
    what: str
    against: str
    treated: Callable[[], Side]
    plain: Callable[[], Side]


def tokens(length: int = LENGTH, width: int = WIDTH) -> Tensor:
    """Return activations [B, L, D]."""
    return torch.randn(BATCH, length, width)


def on_tokens(make: Callable[[], nn.Module], length: int = LENGTH, width: int = WIDTH) -> Callable[[], Side]:
    """Return a side that runs on activations."""
    return lambda: (make(), (tokens(length, width),))


def applied(name: str, make: Callable[[], nn.Module], **options: object) -> Callable[[], nn.Module]:
    """Return what builds a model and applies a method to it."""

    def build() -> nn.Module:
        model = make()
        trimtab.apply(model, name, **options)
        return model

    return build


def attention(*, causal: bool = True) -> nn.Module:
    """Return plain attention."""
    return nn.Sequential(SelfAttention(WIDTH, HEADS, causal=causal))


def block(count: int = 1) -> nn.Module:
    """Return pre-LN blocks of torch's."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options) for _ in range(count)))


def mlp(width: int = 512) -> nn.Module:
    """Return an MLP of four times its width."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def dense(width: int) -> nn.Module:
    """Return one square linear layer."""
    return nn.Sequential(nn.Linear(width, width, bias=False))


def images() -> tuple[Tensor, ...]:
    """Return images of 32 channels."""
    return (torch.randn(16, 32, 32, 32),)


def convolutions(*, frozen: bool = False) -> nn.Module:
    """Return three pairs of convolution and batch norm."""
    parts: list[nn.Module] = []
    for _ in range(3):
        parts += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*parts).train(not frozen)


class Penalised(nn.Module):
    """Convolutions with a penalty on their kernels added to the output's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.model = convolutions()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shifted by the penalty."""
        return self.model(x) + layers.orthogonal_convolution_penalty(self.model)


class Skips(nn.Module):
    """Long skips of a UNet, added up as its decoder would take them."""

    def __init__(self, scale: nn.Module | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of four skips and what the decoder has."""
        skips = [x * 1.0 for _ in range(4)]
        return torch.stack(skips if self.scale is None else list(self.scale(skips))).sum(0)


class Windowed(nn.Module):
    """Attention with a band as its mask, the plain way to compute short-range heads."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        distance = torch.arange(2048)[:, None] - torch.arange(2048)[None]
        self.register_buffer("band", (distance >= 0) & (distance < 64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the heads' outputs."""
        if self.window is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.band)
        return layers.windowed_attention(q, k, v, window=self.window)


def heads() -> tuple[Tensor, ...]:
    """Return queries, keys and values of long sequences."""
    return tuple(torch.randn(1, 4, 2048, 32) for _ in range(3))


def cases() -> list[Case]:
    """Return every layer with its counterpart."""
    causal, full = on_tokens(attention), on_tokens(lambda: attention(causal=False))
    plain = "softmax attention, 512 tokens"
    found = [
        Case(name, what, plain, on_tokens(applied(name, attention, **options)), causal)
        for name, what, options in (
            ("qk-norm", "attention", {}),
            ("gated-attention", "attention, a gate for every element", {}),
            ("gated-attention", "attention, a gate for every head", {"granularity": "headwise"}),
            ("ls-attention", "attention, one long head of eight", {"window": 64}),
            ("cosine-attention", "attention", {}),
            ("gla", "attention's core", {}),
            ("gated-deltanet", "attention's core", {}),
            ("gin-attention", "attention's core", {}),
            ("sigma-reparam", "attention's projections", {}),
        )
    ]
    found += [
        Case(
            name, "attention that is not causal", plain, on_tokens(applied(name, lambda: attention(causal=False))), full
        )
        for name in ("sinkhorn-attention", "qr-attention")
    ]
    for name, make in (
        ("gla", lambda: nn.Sequential(layers.GatedLinearAttention(WIDTH, HEADS))),
        ("gated-deltanet", lambda: nn.Sequential(layers.GatedDeltaNet(WIDTH, HEADS))),
    ):
        what = "the layer, 4,096 tokens"
        found.append(Case(name, what, "itself, 1,024 tokens", on_tokens(make, 4096), on_tokens(make, 1024)))
    found.append(
        Case("ls-attention", "short-range heads in chunks, 2,048 tokens", "the same with a mask",
             lambda: (Windowed(64), heads()), lambda: (Windowed(None), heads()))
    )  # fmt: skip
    found += [
        Case(name, "a transformer block", "the same, pre-LN", on_tokens(applied(name, block)), on_tokens(block))
        for name in ("peri-ln", "res-post-norm")
    ]
    two = on_tokens(lambda: block(2))
    adapted = on_tokens(applied("aside-adapters", lambda: block(2)))
    found.append(Case("aside-adapters", "two transformer blocks, frozen", "all parameters trained", adapted, two))
    wide = on_tokens(mlp, width=512)
    for kind in ("low-rank", "block-shuffle", "block-dense"):
        case = on_tokens(applied("structured-ffn", mlp, kind=kind, keep_first=False), width=512)
        found.append(Case("structured-ffn", f"{kind}, MLP of width 512", "dense", case, wide))
    for width in (1024, 2048, 4096):
        make = applied("monarch", lambda width=width: dense(width))
        what = f"linear layer of width {width:,}"
        sides = (on_tokens(make, 64, width), on_tokens(lambda width=width: dense(width), 64, width))
        found.append(Case("monarch", what, "dense", *sides))
    trained, frozen = (lambda: (convolutions(), images())), (lambda: (convolutions(frozen=True), images()))
    found += [
        Case("tune-mode", "convolutions with batch norm", "Eval mode", lambda: (_tuned(), images()), frozen),
        Case("stable-rank-norm", "convolutions", "plain",
             lambda: (applied("stable-rank-norm", convolutions)(), images()), trained),
        Case("orthogonal-convolution", "convolutions", "no penalty", lambda: (Penalised(), images()), trained),
        Case("long-skip-scale", "four skips, constant", "not scaled",
             lambda: (Skips(layers.LongSkipScale(4)), images()), lambda: (Skips(None), images())),
        Case("long-skip-scale", "four skips, learnable", "not scaled",
             lambda: (Skips(layers.LongSkipScale(4, kind="learnable", channels=32)), images()),
             lambda: (Skips(None), images())),
        Case("scaled-sigmoid", "activation", "sigmoid", on_tokens(layers.ScaledSigmoid), on_tokens(nn.Sigmoid)),
    ]  # fmt: skip
    return found


def _tuned() -> nn.Module:
    model = convolutions(frozen=True)
    trimtab.apply(model, "tune-mode")
    return model


def prepared(side: Callable[[], Side]) -> Callable[[], None]:
    """Build a side and return what runs its forward and backward pass once."""
    torch.manual_seed(0)
    model, inputs = side()
    leaves = tuple(x.requires_grad_() for x in inputs)

    def run() -> None:
        for leaf in (*leaves, *model.parameters()):
            leaf.grad = None
        model(*leaves).square().mean().backward()

    return run


def peak(run: Callable[[], None]) -> int:
    """Return the most bytes that a run's tensors hold at once."""
    with PeakMemory() as memory:
        run()
    return memory.peak


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    one_thread()
    rows = []
    for case in cases():
        if given.only and case.method not in given.only:
            continue
        sides = {"treated": prepared(case.treated), "plain": prepared(case.plain)}
        bytes_ = {name: peak(run) for name, run in sides.items()}
        seconds = interleaved(sides, repetitions=given.repetitions)
        time = ratio(seconds, "treated", "plain")
        rows.append(
            {
                "method": case.method,
                "what": case.what,
                "against": case.against,
                "seconds": {name: min(values) for name, values in seconds.items()},
                "time": time,
                "memory": bytes_["treated"] / bytes_["plain"],
                "peak_bytes": bytes_,
            }
        )
        print(
            f"{case.method:<24} {case.what:<42} {time['median']:6.2f}x time  {rows[-1]['memory']:6.2f}x memory",
            flush=True,
        )
    sizes = {"batch": BATCH, "length": LENGTH, "width": WIDTH, "heads": HEADS, "repetitions": given.repetitions}
    print("written:", write("layers", {**sizes, "rows": rows}))


if __name__ == "__main__":
    main()
