"""Coherent gradients: how far examples agree on a direction, and mean gradients without what few examples want.

A direction that many examples share generalises; one that a single example wants memorises it. With g_1, ..., g_m the
gradients of m examples,

    m-coherence = m |mean_i g_i|^2 / mean_i |g_i|^2

is the number of examples that a step along one of them helps, on average: m where all are equal, 1 where they are
orthogonal. Two means suppress weakly supported directions, entry by entry: the winsorised mean, in which the c smallest
and the c largest of the m values take the value of their nearest neighbour that is left, and the median of the means of
k groups of examples.

Chatterjee 2020 (arXiv:2002.10657), section 4, winsorised gradients; Chatterjee and Zielinski 2020 (arXiv:2008.01217),
m-coherence; and 2022 (arXiv:2203.10036), medians of means, RM3 with k = 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError

__all__ = ["m_coherence", "median_of_means", "per_example_gradients", "winsorized_mean"]

Gradients = Mapping[str, Tensor]
"""By parameter name: [m, ...], one gradient an example first."""


def per_example_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of each example's loss, by parameter name.

    Args:
        model: without layers that mix examples (BatchNorm in training) and without randomness.
        loss: of (outputs, targets) of a batch of one example, to a scalar.
        inputs: [m, ...].
        targets: [m, ...].

    Returns:
        For each trainable parameter its gradients, [m, *shape].

    Example:
        >>> model = nn.Linear(3, 2)
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 2)
        >>> {name: tuple(g.shape) for name, g in per_example_gradients(model, nn.functional.mse_loss, x, y).items()}
        {'weight': (4, 2, 3), 'bias': (4, 2)}
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def of_one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, {**params, **fixed}, (x.unsqueeze(0),)), y.unsqueeze(0))

    return vmap(grad(of_one), in_dims=(None, 0, 0))(trained, inputs, targets)


@torch.no_grad()
def m_coherence(gradients: Gradients | Sequence[Tensor] | Tensor) -> Tensor:
    """Return m |mean g_i|^2 / mean |g_i|^2 over all parameters, in float64.

    Args:
        gradients: of m examples (or micro-batches, then of those), first in each tensor.

    Returns:
        A scalar in [0, m]; NaN if all gradients are 0.

    Raises:
        UsageError: if the tensors are not of the same number of examples, at least one.

    Example:
        >>> m_coherence(torch.eye(3)), m_coherence(torch.ones(3, 5))
        (tensor(1., dtype=torch.float64), tensor(3., dtype=torch.float64))

    References:
        Chatterjee and Zielinski 2020, arXiv:2008.01217.
    """
    tensors = _tensors(gradients)
    mean_square = sum(g.double().square().sum() for g in tensors)
    square_of_sum = sum(g.double().sum(0).square().sum() for g in tensors)
    # m |sum / m|^2 / (squares / m) = |sum|^2 / squares.
    return torch.as_tensor(square_of_sum / mean_square)


@torch.no_grad()
def winsorized_mean(gradients: Any, *, c: int = 1) -> Any:
    """Return the mean over examples with the c smallest and the c largest values of each entry pulled in.

    Args:
        gradients: a tensor [m, ...], or a mapping of them by name.
        c: how many on each side; at least 0 and below m / 2.

    Returns:
        The mean, without the first dimension, in the form of `gradients`; with c = 0 the mean itself.

    Raises:
        UsageError: if c is out of range.

    Example:
        >>> winsorized_mean(torch.tensor([[0.0], [1.0], [2.0], [100.0]]))  # of 1, 1, 2, 2
        tensor([1.5000])

    References:
        Chatterjee 2020, arXiv:2002.10657, section 4.
    """
    if isinstance(gradients, Mapping):
        return {name: winsorized_mean(value, c=c) for name, value in gradients.items()}
    m = _tensors(gradients)[0].shape[0]
    if not isinstance(c, int) or c < 0 or 2 * c >= m:
        raise UsageError(f"c must be a whole number from 0 to below m / 2 = {m / 2:g}, got {c!r}.")
    if c == 0:
        return gradients.mean(0)
    ordered = gradients.sort(dim=0).values
    return gradients.clamp(ordered[c], ordered[m - 1 - c]).mean(0)


@torch.no_grad()
def median_of_means(gradients: Any, *, groups: int = 3) -> Any:
    """Return the median, entry by entry, of the means of consecutive groups of examples.

    Args:
        gradients: a tensor [m, ...], or a mapping of them by name; m a multiple of `groups`.
        groups: how many, odd; with as many as there are micro-batch gradients it is their median.

    Returns:
        The median, without the first dimension, in the form of `gradients`.

    Raises:
        UsageError: if groups is not odd or does not divide m.

    Example:
        >>> median_of_means(torch.tensor([[1.0], [2.0], [60.0]]))
        tensor([2.])

    References:
        Chatterjee and Zielinski 2022, arXiv:2203.10036.
    """
    if isinstance(gradients, Mapping):
        return {name: median_of_means(value, groups=groups) for name, value in gradients.items()}
    m = _tensors(gradients)[0].shape[0]
    if not isinstance(groups, int) or groups < 1 or groups % 2 == 0 or m % groups:
        raise UsageError(f"groups must be odd and divide the number of examples, {m}, got {groups!r}.")
    return gradients.unflatten(0, (groups, m // groups)).mean(1).median(0).values


def _tensors(gradients: Gradients | Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(gradients, Tensor):
        tensors = [gradients]
    else:
        tensors = list(gradients.values() if isinstance(gradients, Mapping) else gradients)
    sizes = {g.shape[0] if g.ndim else 0 for g in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(f"gradients must have one number of examples, at least 1, first; got {sorted(sizes)}.")
    return tensors


CARD = Card(
    name="coherent-gradients",
    room="optim",
    summary="mean gradients without what few examples want, and how far examples agree",
    paper=Paper(
        "Coherent Gradients: An Approach to Understanding Generalization in Gradient Descent-based Optimization",
        2020,
        arxiv="2002.10657",
    ),
    equation="g = mean_i clip(g_i, c-th smallest, c-th largest) by entry;  m-coherence = m |mean g_i|^2 / mean |g_i|^2",
    claim="Suppressing weakly supported directions greatly reduces the memorisation of wrong labels.",
    acts_on="optimizer",
    entry="trimtab.optim.clipping.coherent_gradients:winsorized_mean",
    treats={"label-noise": 2, "overfitting": 4, "low-gradient-coherence": 1},
    defaults=(Default("c", 1, "ours: the least; the paper tries 1 to 8 of batches of 100 (recalled)"),),
    verified={
        "equation": (
            "tests/optim/clipping/test_coherent_gradients.py::test_winsorized_mean_equals_a_loop",
            "tests/optim/clipping/test_coherent_gradients.py::test_coherence_of_identical_and_orthogonal_gradients",
            "tests/optim/clipping/test_coherent_gradients.py::test_coherence_equals_the_definition",
        ),
        "reference": ("tests/optim/clipping/test_coherent_gradients.py::test_winsorized_mean_equals_scipy",),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_winsorized_gradients_memorise_fewer_wrong_labels",),
    },
    deviations=(
        "The paper clips at a percentile c of the batch; here c counts examples.",
        "The mean, from all examples at once, is put into p.grad by the caller; any optimizer follows.",
        "The authors' RM3 takes the median over the last three mini-batches, with one new one a step; here the groups "
        "are of one batch.",
    ),
)
