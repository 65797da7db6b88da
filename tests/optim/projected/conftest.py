"""Runs of an optimizer on a fixed stream of gradients with spikes, so that two can be compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SHAPES = ((7, 5), (4, 9), (6,))
STEPS = 130
SPIKES = (45, 90)


class Streams:
    shapes, steps = SHAPES, STEPS

    @staticmethod
    def start():
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    @staticmethod
    def gradients():
        """Every step's gradients: normal, of scales that differ by entry, and a thousandfold at the spikes."""
        generator = torch.Generator().manual_seed(0)
        scales = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in SHAPES]
        for step in range(STEPS):
            factor = 1000.0 if step in SPIKES else 1.0
            yield [factor * s * (0.3 + torch.randn(s.shape, generator=generator, dtype=torch.float64)) for s in scales]

    def run(self, make):
        params = [nn.Parameter(value) for value in self.start()]
        optimizer = make(params)
        for step in self.gradients():
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [p.detach() for p in params]

    def drift(self, ours, theirs):
        """The largest difference between two ends, over the largest distance from the start to the second."""
        return max(
            float((x - y).abs().max() / (y - s).abs().max()) for x, y, s in zip(ours, theirs, self.start(), strict=True)
        )


@pytest.fixture
def streams():
    return Streams()
