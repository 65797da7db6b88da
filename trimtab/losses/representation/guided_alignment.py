"""Guidance: a network that does not train by itself is aligned, layer by layer, with one that would.

    loss = task loss + alpha sum over pairs of layers of (1 - CKA(target's activations, guide's activations))
    CKA(X, Y) = <K, L> / (|K| |L|),   K = H X X^T H, L = H Y Y^T H, H = I - 1 1^T / n

The guide is frozen and in evaluation mode; a trained one hands down what it knows, a randomly initialised one the bias
of its architecture. CKA (Kornblith et al. 2019, arXiv:1905.00414) compares how samples relate to each other, so that
layers of any two shapes can be compared. It is the cosine of centred Gram matrices, whose inner product is the biased
estimate of HSIC; with U-centred ones (zero diagonals) it is the unbiased one of Song et al. 2012.

Subramaniam et al. 2024 (arXiv:2410.20035); authors' code vsubramaniam851/untrainable-networks.

Shape suffixes: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose

__all__ = ["Guidance", "guidance_loss", "linear_cka", "match_layers"]

_TINY = 1e-12


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Return the linear centred kernel alignment of two sets of activations of the same samples.

        CKA = <K, L> / (|K| |L|), K and L the centred Gram matrices of x and y

    Args:
        x: [B, ...], flattened behind the first dimension.
        y: [B, ...].
        unbiased: whether Gram matrices are U-centred, which makes HSIC unbiased: two unrelated sets have then CKA 0 on
            average, where the biased one tends to 1 as widths pass the number of samples.

    Returns:
        A scalar, in float32 or better: in [0, 1], or [-1, 1] if unbiased. Activations that are the same for all samples
        have CKA 0, with gradient 0.

    Raises:
        UsageError: if the sets are not of the same samples, or too few: 2, or 4 if unbiased.

    Example:
        >>> x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
        >>> round(float(linear_cka(x, 3 * x.flip(1) + 1)), 4)  # rotations, scale and offset do not matter
        1.0

    References:
        Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012, Journal of Machine Learning Research 13.
    """
    least = 4 if unbiased else 2
    for name, value in (("x", x), ("y", y)):
        if not value.is_floating_point() or value.dim() < 1 or value.shape[0] < least:
            raise UsageError(
                f"{name} must be activations of at least {least} samples, got {value.dtype} of shape "
                f"{tuple(value.shape)}."
            )
    if x.shape[0] != y.shape[0]:
        raise UsageError(f"CKA compares the same samples, got {x.shape[0]} and {y.shape[0]}.")
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return (_unit_gram(x.to(wide), unbiased) * _unit_gram(y.to(wide), unbiased)).sum()


def guidance_loss(
    target: Sequence[Tensor], guide: Sequence[Tensor], *, unbiased: bool = False, reduction: str = "sum"
) -> Tensor:
    """Return the sum over pairs of layers of 1 - CKA; add it to the task's loss.

    Args:
        target: activations [B, ...] of layers of the network that is trained.
        guide: activations of the guide's layers, in the same order; no gradient goes into them.
        unbiased: see `linear_cka`.
        reduction: `"sum"` over the pairs (the authors'), `"mean"` or `"none"`.

    Returns:
        A scalar, or one value a pair.

    Raises:
        UsageError: if there are no pairs, or an argument breaks its rule.

    Example:
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> abs(round(float(guidance_loss([x, x], [x, 2 * x])), 4))
        0.0

    References:
        Subramaniam et al. 2024, arXiv:2410.20035, section 3.
    """
    choose("reduction", reduction, ("mean", "none", "sum"))
    if len(target) != len(guide) or not target:
        raise UsageError(f"guidance needs pairs of layers, got {len(target)} of the target and {len(guide)} guides.")
    values = torch.stack([1 - linear_cka(x, y.detach(), unbiased=unbiased) for x, y in zip(target, guide, strict=True)])
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def match_layers(target: Sequence[str], guide: Sequence[str]) -> dict[str, str]:
    """Return for each of the guide's layers a layer of the target, evenly spaced from the first to the last.

    Args:
        target: names of the target's layers, in order.
        guide: names of the guide's layers, in order.

    Returns:
        The target's layer for each guide's one.

    Raises:
        UsageError: if one of them has no layers.

    Example:
        >>> match_layers(["0", "2", "4", "6", "8"], ["stem", "block", "pool"])
        {'stem': '0', 'block': '4', 'pool': '8'}
    """
    if not target or not guide:
        raise UsageError("layers can be matched only where both networks have some.")
    step = (len(target) - 1) / (len(guide) - 1) if len(guide) > 1 else 1
    return {name: target[min(round(i * step), len(target) - 1)] for i, name in enumerate(guide)}


class Guidance:
    """Captures the activations of chosen layers of both networks and returns the loss that aligns them.

    The target's layers are those of its last forward pass with gradients; the guide runs when `loss` is called, in
    evaluation mode and without gradients, and is left as it was. Hooks change nothing; `remove`, or leaving the `with`
    block, takes them off.

    Args:
        target: the network that is trained.
        guide: the network that it is aligned with, trained or at its initialisation.
        layers: the target's layer for each of the guide's layers, by module names, as `match_layers` returns. A layer
            that returns a tuple counts with its first tensor.
        unbiased: see `linear_cka`.
        reduction: see `guidance_loss`.

    Raises:
        UsageError: if a layer does not exist.

    Example:
        >>> target = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> guide, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU()), torch.randn(10, 4)
        >>> with Guidance(target, guide, {"1": "1"}) as guidance:
        ...     task = target(x).square().mean()
        ...     (task + guidance.loss(x)).backward()

    References:
        Subramaniam et al. 2024, arXiv:2410.20035.
    """

    def __init__(
        self,
        target: nn.Module,
        guide: nn.Module,
        layers: Mapping[str, str],
        *,
        unbiased: bool = False,
        reduction: str = "sum",
    ) -> None:
        if not layers:
            raise UsageError("layers must name at least one layer of the guide and the target's for it.")
        choose("reduction", reduction, ("mean", "none", "sum"))
        self.guide, self.layers, self.unbiased, self.reduction = guide, dict(layers), unbiased, reduction
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._hooks: list[Any] = []
        modules = {"guide": dict(guide.named_modules()), "target": dict(target.named_modules())}
        wanted = {"guide": list(self.layers), "target": list(dict.fromkeys(self.layers.values()))}
        for kind, names in wanted.items():
            for name in names:
                choose(f"layer of the {kind}", name, modules[kind])
        for kind, names in wanted.items():
            for name in names:
                self._hooks.append(modules[kind][name].register_forward_hook(self._capture(kind, name)))

    def _capture(self, kind: str, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(value, Tensor) and (kind == "guide" or torch.is_grad_enabled()):
                self._seen[kind, name] = value

        return hook

    def loss(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the guide on the inputs and return the loss of the pairs; call it after the target's forward pass.

        Args:
            *inputs: of the guide: the batch that the target has just seen.
            **named: further inputs of the guide.

        Returns:
            See `guidance_loss`.

        Raises:
            UsageError: if a layer gave no tensor since the last call.
        """
        modes = [(module, module.training) for module in self.guide.modules()]
        try:
            self.guide.eval()
            with torch.no_grad():
                self.guide(*inputs, **named)
        finally:
            for module, mode in modes:
                module.training = mode
        pairs = [(("target", ours), ("guide", theirs)) for theirs, ours in self.layers.items()]
        if missing := sorted(layer for pair in pairs for layer in pair if layer not in self._seen):
            kind, name = missing[0]
            raise UsageError(f"the {kind}'s {name!r} gave no tensor: run the target with gradients before the loss.")
        targets, guides = [self._seen[ours] for ours, _ in pairs], [self._seen[theirs] for _, theirs in pairs]
        self._seen.clear()
        return guidance_loss(targets, guides, unbiased=self.unbiased, reduction=self.reduction)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def __enter__(self) -> Guidance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _unit_gram(x: Tensor, unbiased: bool) -> Tensor:
    """Return the centred Gram matrix [B, B] of activations, of norm 1, or 0 where all samples are the same."""
    x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    # Shifted by the first sample, samples that are all the same are 0 exactly, and not the rounding of their mean.
    x = x - x[:1].detach()
    x = x - x.mean(0)
    # CKA does not depend on scale: without it, squares of the faint signals of deep networks would underflow.
    x = x / x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    x = x / torch.linalg.vector_norm(x.detach()).clamp(min=_TINY)
    k_BB = x @ x.T
    if unbiased:
        n = len(x)
        k_BB = k_BB - torch.diag(k_BB.diagonal())
        means = k_BB.sum(1) / (n - 2)
        k_BB = k_BB - means - means.unsqueeze(1) + k_BB.sum() / ((n - 1) * (n - 2))
        k_BB = k_BB - torch.diag(k_BB.diagonal())
    return k_BB / torch.linalg.vector_norm(k_BB).clamp(min=_TINY)


CARD = Card(
    name="guidance",
    room="losses",
    summary="layers of a network that does not train are aligned by CKA with those of a trained or untrained guide",
    paper=Paper(
        "Training the Untrainable: Introducing Inductive Bias via Representational Alignment",
        2024,
        arxiv="2410.20035",
        code="https://github.com/vsubramaniam851/untrainable-networks",
    ),
    equation="loss = task + alpha sum_l (1 - CKA(target_l, guide_l)), CKA(X, Y) = <K, L> / (|K| |L|), centred Grams",
    claim=(
        "Deep fully connected networks stop overfitting on vision, plain deep CNNs approach ResNets and RNNs "
        "Transformers, even where the guide is untrained."
    ),
    acts_on="run",
    entry="trimtab.losses.representation.guided_alignment:Guidance",
    defaults=(
        Default("unbiased", False, "authors' code, rep_sims.py: centred Gram matrices"),
        Default("reduction", "sum", "authors' code, rep_sim_loss.py"),
    ),
    verified={
        "equation": (
            "tests/losses/representation/test_guided_alignment.py::test_equals_numpy",
            "tests/losses/representation/test_guided_alignment.py::test_equals_the_form_of_features",
            "tests/losses/representation/test_guided_alignment.py::test_gradcheck",
            "tests/losses/representation/test_guided_alignment.py::test_loss_is_a_sum_over_pairs",
            "tests/losses/representation/test_guided_alignment.py::test_guidance_captures_both_networks",
            "tests/losses/representation/test_guided_alignment.py::test_layers_are_matched_evenly",
        ),
    },
    deviations=(
        "Activations are centred and scaled before their Gram matrices, which changes no value but those that "
        "round-off made: the authors centre Gram matrices in float32, which under- or overflow for faint or strong "
        "signals. Activations that are all the same give CKA 0 in place of NaN.",
        "The target's layers are captured in the task's own forward pass; the authors run the target a second time, so "
        "that its dropout differs.",
        "The unbiased HSIC is an addition. The weight alpha, the authors' 1, is the caller's factor; their option to "
        "feed the guide noise is `loss(noise)`.",
        "CKA is of the samples it is given: micro-batches and ranks each align their own.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.guidance:untrainable",
            "guide=none,lr=0.001",
            "guide=untrained,lr=0.001",
            metric="accuracy",
            higher_is_better=True,
            mechanism="signal",
            outcome=(
                "no evidence: accuracy stays at chance, 0.072 in both arms (n=5), although the first layer's gradient "
                "grows from 10^-10.0 to 10^-0.3 times the last one's; on a tuning seed also at rates 0.003 and 0.01, "
                "and with norm=true,depth=48"
            ),
        ),
        Experiment(
            "trimtab.studies.guidance:untrainable",
            "guide=none,lr=0.001",
            "guide=trained,lr=0.001",
            metric="accuracy",
            higher_is_better=True,
            mechanism="signal",
            outcome=(
                "no evidence: accuracy stays at chance, 0.072 in both arms (n=5), although the first layer's gradient "
                "grows from 10^-10.0 to 10^0.0 times the last one's"
            ),
        ),
    ),
)
