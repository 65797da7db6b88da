"""Coherent gradients: m-coherence and robust means against their definitions, scipy, and gradients one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mstats
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import m_coherence, median_of_means, per_example_gradients, winsorized_mean


def _gradients(m=9):
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (4, 3), "bias": (4,), "gain": ()}
    return {name: torch.randn(m, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("c", [0, 1, 3])
def test_winsorized_mean_equals_a_loop(c):
    gradients = _gradients()
    result = winsorized_mean(gradients, c=c)
    for name, g in gradients.items():
        columns = g.reshape(9, -1).T.tolist()
        expected = []
        for column in columns:
            low, high = sorted(column)[c], sorted(column)[8 - c]
            expected.append(sum(min(max(value, low), high) for value in column) / 9)
        assert result[name].reshape(-1).tolist() == pytest.approx(expected, rel=1e-12)
        assert result[name].shape == g.shape[1:]


def test_winsorized_mean_equals_scipy():
    g = _gradients(10)["weight"]
    expected = mstats.winsorize(g.numpy(), limits=(0.2, 0.2), axis=0).mean(0)
    np.testing.assert_allclose(winsorized_mean(g, c=2).numpy(), np.asarray(expected), rtol=1e-12)


def test_one_example_cannot_move_the_robust_means():
    g = torch.ones(9, 5)
    g[4] = 1e6
    torch.testing.assert_close(winsorized_mean(g), torch.ones(5))
    torch.testing.assert_close(median_of_means(g), torch.ones(5))


def test_median_of_means_equals_a_loop():
    g = _gradients()["weight"]
    means = [g[3 * k : 3 * k + 3].mean(0) for k in range(3)]
    expected = torch.tensor(np.median(torch.stack(means).numpy(), axis=0))
    torch.testing.assert_close(median_of_means({"a": g})["a"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(median_of_means(g, groups=9), torch.tensor(np.median(g.numpy(), axis=0)))


def test_coherence_of_identical_and_orthogonal_gradients():
    assert m_coherence(torch.full((7, 11), 0.3)).item() == pytest.approx(7, rel=1e-6)
    assert m_coherence([torch.eye(6) * 5, torch.zeros(6, 2)]).item() == pytest.approx(1, rel=1e-12)
    assert m_coherence(torch.tensor([[1.0], [-1.0]])).item() == 0


def test_coherence_equals_the_definition():
    gradients = _gradients()
    flat = torch.cat([g.reshape(9, -1) for g in gradients.values()], dim=1)
    # The number of examples that a step along one of them helps: sum of <g_i, g_j> over sum of |g_i|^2.
    products = sum(float(flat[i] @ flat[j]) for i in range(9) for j in range(9))
    expected = products / sum(float(flat[i] @ flat[i]) for i in range(9))
    assert m_coherence(gradients).item() == pytest.approx(expected, rel=1e-12)


def test_per_example_gradients_equal_one_by_one():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    result = per_example_gradients(model, F.cross_entropy, x, y)
    assert "0.bias" not in result
    for index in range(5):
        model.zero_grad()
        F.cross_entropy(model(x[index : index + 1]), y[index : index + 1]).backward()
        for name, g in result.items():
            torch.testing.assert_close(g[index], model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_wrong_values_are_refused():
    g = torch.ones(4, 2)
    with pytest.raises(UsageError, match="c must be a whole number from 0 to below m / 2 = 2, got 2"):
        winsorized_mean(g, c=2)
    with pytest.raises(UsageError, match="groups must be odd and divide the number of examples, 4, got 3"):
        median_of_means(g)
    with pytest.raises(UsageError, match="one number of examples"):
        m_coherence([g, torch.ones(3, 2)])
