"""Runs of an optimizer on a fixed stream of gradients, so that two can be compared step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SHAPES = ((7, 5), (6,), (), (2, 3, 4))


def gradients(shapes=SHAPES, *, steps=130, spikes=(45, 90), dtype=torch.float64, seed=0):
    """Yield gradients for every step: normal, of scales that differ by entry, and a thousandfold at the spikes."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in shapes]
    for step in range(steps):
        factor = 1000.0 if step in spikes else 1.0
        yield [
            (factor * scale * (0.3 + torch.randn(scale.shape, generator=generator, dtype=torch.float64))).to(dtype)
            for scale in scales
        ]


def start(shapes=SHAPES, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(make, shapes=SHAPES, **stream):
    """Return every parameter after each step of the optimizer that `make` returns for a list of parameters."""
    params = [nn.Parameter(value) for value in start(shapes, dtype=stream.get("dtype", torch.float64))]
    optimizer = make(params)
    path = []
    for step in gradients(shapes, **stream):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def deviation(ours, theirs, shapes=SHAPES):
    """Return the largest difference between two paths, over the largest distance that the second one went."""
    origin = start(shapes)
    moved = max(float((p - o).abs().max()) for last in theirs for p, o in zip(last, origin, strict=True))
    apart = max(
        float((x - y).abs().max()) for one, two in zip(ours, theirs, strict=True) for x, y in zip(one, two, strict=True)
    )
    return apart / moved


@pytest.fixture
def streams():
    """The functions above: test modules cannot import from each other."""

    class Streams:
        pass

    found = Streams()
    found.shapes, found.gradients, found.start = SHAPES, gradients, start
    found.run, found.deviation = run, deviation
    return found
