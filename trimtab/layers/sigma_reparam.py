"""sigmaReparam: divide every weight matrix by its spectral norm and learn its scale.

Attention entropy falls exponentially with the spectral norm of the attention logits, and collapses in unstable
training. Reparametrising every linear layer makes its spectral norm a learned scalar:

    W_hat = gamma / sigma(W) * W,   sigma(W) = u^T W v

u and v are the first singular vectors by power iteration, one iteration per training forward, held constant in the
gradient; gamma is learned. Zhai et al. 2023 (arXiv:2303.06296); authors' code apple/ml-sigma-reparam at fea4e35.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._checkpointing import recomputing
from trimtab.layers._power_iteration import as_matrix, first_singular, iterate, unit
from trimtab.scalars import to_scalar

__all__ = ["SigmaReparam"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class SigmaReparam(nn.Module):
    """Parametrization W -> gamma / sigma(W) * W, for `torch.nn.utils.parametrize.register_parametrization`.

    The power iteration starts from fixed vectors, so that building one consumes no random numbers, and is carried on
    until sigma has converged. In training each use of the weight then takes one more iteration, whose vectors are kept
    in the buffers `u` and `v`; in evaluation they stay as they are. It runs in float32 or better, under autocast too.

    Args:
        weight: the tensor to be reparametrised; its dimensions after the first are taken as one.
        gamma: initial gamma, above 0, or `"spectral"` for sigma(W), which leaves the weight as it is.

    Raises:
        UsageError: if the weight has fewer than two dimensions, is zero or not finite, or gamma is not above 0.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> _ = parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight, gamma=2.0))
        >>> round(to_scalar(torch.linalg.matrix_norm(linear.weight, 2)), 3)
        2.0

    References:
        Zhai et al. 2023, arXiv:2303.06296, section 3.2; vision/layers.py of the authors' code.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, gamma: float | str = 1.0) -> None:
        super().__init__()
        if isinstance(gamma, str):
            if gamma != "spectral":
                raise UsageError(f"gamma_init must be a number above 0 or 'spectral', got {gamma!r}.")
        elif not gamma > 0:
            raise UsageError(f"gamma_init must be above 0, got {gamma}: the paper's value is 1.")
        if weight.dim() < 2:
            raise UsageError(
                f"sigma-reparam needs a matrix, got shape {tuple(weight.shape)}: leave vectors as they are."
            )
        if weight.is_meta or hasattr(weight, "full_tensor"):
            what = "on the meta device" if weight.is_meta else "sharded"
            raise UsageError(
                f"sigma-reparam needs the weight's values, but it is {what}: apply it to the whole weight."
            )
        matrix = as_matrix(weight.detach())
        u, v, sigma = first_singular(matrix)
        if not 0 < to_scalar(sigma) < float("inf"):
            raise UsageError(
                f"sigma-reparam needs a non-zero, finite weight, but its spectral norm is {to_scalar(sigma):g}."
            )
        self.register_buffer("u", u.to(weight.dtype))
        self.register_buffer("v", v.to(weight.dtype))
        start = sigma if isinstance(gamma, str) else torch.full_like(sigma, gamma)
        # One dimension, not none: fully_shard takes no scalar parameters.
        self.gamma = nn.Parameter(start.reshape(1).to(weight.dtype))
        self._once_a_forward = False
        self._advanced = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return the reparametrised weight, in the weight's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = as_matrix(weight)
            with torch.no_grad():
                if self.training and not self._advanced and not recomputing():
                    u, v = iterate(matrix, self.v.to(matrix.dtype))
                    self.u.copy_(u)
                    self.v.copy_(v)
                    self._advanced = self._once_a_forward
                # New tensors, as the next forward changes the buffers while this one may still wait for its backward;
                # buffers in bfloat16 have length 1 only once they are normalised in float32.
                u, v = unit(self.u.to(matrix.dtype)), unit(self.v.to(matrix.dtype))
            scale = self.gamma.to(matrix.dtype) / torch.dot(u, torch.mv(matrix, v))
            return (scale * matrix).reshape(weight.shape).to(weight.dtype)


def _rearm(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of nn.MultiheadAttention, which reads its weight several times: the next forward iterates again."""
    for parametrized in (module, module.out_proj):
        for parametrization in _own(parametrized):  # type: ignore[arg-type]
            parametrization._advanced = False


def _own(module: nn.Module) -> list[SigmaReparam]:
    lists = getattr(module, "parametrizations", {}).values()
    return [part for parts in lists for part in parts if isinstance(part, SigmaReparam)]


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        names: tuple[str, ...] = _MULTIHEAD_WEIGHTS
    # GPT-2's Conv1D is a linear layer whose weight is stored the other way round; its spectral norm is the same.
    elif isinstance(module, _KINDS) or type(module).__name__ == "Conv1D":
        names = ("weight",)
    else:
        return ()
    return tuple(name for name in names if isinstance(module._parameters.get(name), Tensor))


def _apply(model: nn.Module, *, gamma_init: float | str = 1.0, skip: Sequence[str] = ()) -> dict[str, str]:
    """Reparametrise every linear, convolution and nn.MultiheadAttention weight of a model.

    A weight that two modules share (a head tied to the embedding) is left as it is: reparametrised, only one of the two
    would change.

    Args:
        model: the model.
        gamma_init: initial gamma, or `"spectral"` to keep the function that the model computes.
        skip: patterns (`"head"`, `"blocks.0.*"`) of names of modules to leave as they are.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    found: dict[tuple[str, str], tuple[nn.Module, SigmaReparam]] = {}
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            continue
        for weight in _weight_names(module):
            parameter = module._parameters[weight]
            if parameter is None or owners[id(parameter)] > 1:
                continue
            try:
                found[name, weight] = (module, SigmaReparam(parameter, gamma_init))
            except UsageError as error:
                raise UsageError(
                    f"{name or type(model).__name__}.{weight}: {error} Or name the module in skip."
                ) from error
    if not found:
        already = " that is not reparametrised already" if any(_own(module) for module in model.modules()) else ""
        raise UsageError(
            f"sigma-reparam: no weight to change in {type(model).__name__}. Looked for nn.Linear, nn.Conv1d, "
            f"nn.Conv2d, nn.Conv3d, nn.MultiheadAttention and Conv1D with a weight of their own{already}."
        )
    changes: dict[str, str] = {}
    value = "gamma = sigma(W)" if isinstance(gamma_init, str) else f"gamma = {gamma_init:g}"
    for (name, weight), (module, reparam) in found.items():
        reparam.train(module.training)
        parametrize.register_parametrization(module, weight, reparam)
        what = f"{weight} = gamma / sigma(W) * W, {value}"
        changes[name] = f"{changes[name]}; {what}" if name in changes else what
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and (parts := [*_own(module), *_own(module.out_proj)]):
            for part in parts:
                part._once_a_forward = True
            module.register_forward_hook(_rearm)
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Merge every reparametrised weight into a plain one: the model computes the same function."""
    changes: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        for handle in [handle for handle, hook in module._forward_hooks.items() if hook is _rearm]:
            del module._forward_hooks[handle]
        for weight, parts in list(getattr(module, "parametrizations", {}).items()):
            if not any(isinstance(part, SigmaReparam) for part in parts):
                continue
            if len(parts) > 1:
                raise UsageError(f"sigma-reparam: {name}.{weight} has other parametrizations too: remove those first.")
            parts.eval()  # reading the weight must not take one more iteration
            parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
            changes[name] = f"{changes[name]}; {weight} merged" if name in changes else f"{weight} merged"
    return changes


CARD = Card(
    name="sigma-reparam",
    room="layers",
    summary="every weight matrix divided by its spectral norm and scaled by a learned gamma",
    paper=Paper(
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        2023,
        arxiv="2303.06296",
        code="https://github.com/apple/ml-sigma-reparam",
    ),
    equation="W_hat = gamma / sigma(W) * W, sigma(W) = u^T W v by power iteration, gamma learned",
    claim=(
        "Prevents attention entropy collapse: a ViT trains to competitive performance without warm-up, weight decay, "
        "layer normalisation or adaptive optimizer, and deep translation and speech models train without warm-up."
    ),
    acts_on="model",
    entry="trimtab.layers.sigma_reparam:SigmaReparam",
    treats={"attention-entropy-collapse": 1, "attention-logit-growth": 2},
    defaults=(
        Default("gamma_init", 1.0, "paper, section 3.2; the authors' speech code (speech/layers.py)"),
        Default("iterations per training forward", 1, "authors' code, vision/layers.py and speech/layers.py"),
        Default("skip", (), "paper: all linear layers"),
    ),
    verified={
        "equation": (
            "tests/layers/test_sigma_reparam.py::test_spectral_norm_is_gamma",
            "tests/layers/test_sigma_reparam.py::test_gradient_is_that_of_the_exact_spectral_norm",
            "tests/layers/test_sigma_reparam.py::test_one_power_iteration_per_training_forward",
            "tests/layers/test_sigma_reparam.py::test_attention_entropy_stays_above_the_papers_bound",
        ),
        "reference": ("tests/layers/test_sigma_reparam.py::test_equals_torch_spectral_norm",),
        "claim": ("tests/claims/test_remedies.py::test_attention_logits_stay_bounded_and_entropy_does_not_collapse",),
    },
    deviations=(
        "gamma starts at 1 as in the paper and the authors' speech code; their vision code starts it at sigma(W) "
        "(gamma_init='spectral' here).",
        "The authors take the first vectors from an SVD, and one unsaved power iteration in evaluation too; here they "
        "come from power iteration to convergence, and evaluation uses the vectors of the last training forward.",
        "The authors' convert_to_sn also draws new weights from N(0, 0.02) and their ViT drops every LayerNorm; here "
        "weights and norms stay as they are.",
        "Weights that two modules share, such as a head tied to the embedding, are left as they are. A fused qkv "
        "projection is one matrix with one gamma, as in the authors' vision code.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "lr=0.1",
            "lr=0.1,with=sigma-reparam",
            mechanism="attention_max_logit",
            outcome=(
                "better: final loss 2.148 to 1.759, difference -0.389 (95 % interval -0.460 to -0.318), n=5; largest "
                "attention logit 2,160 to 37, lowest attention entropy 0.011 to 1.27 nats"
            ),
        ),
        Experiment(
            "trimtab.studies.normless:digits",
            "lr=0.02",
            "lr=0.005,sigma_reparam=true",
            metric="accuracy",
            higher_is_better=True,
            mechanism="training_loss",
            outcome=(
                "worse: accuracy 0.816 to 0.213, difference -0.604 (95 % interval -0.650 to -0.557), n=5, each side at "
                "its best of six rates, 300 steps without norms; training loss 0.54 to 2.12"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
