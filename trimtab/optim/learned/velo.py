"""VeLO's update rule: a network per tensor chooses, at every step, the small network that moves each of its parameters.

For each tensor an LSTM sees 30 numbers (how far training is, how the loss has fallen, the size of its moments and its
rank) and answers with weights c over a bank of B small networks, and a step size s. The blend of the bank

    theta = 100 mean_b c_b bank_b          (30 features -> 4 -> 4 -> 2, ReLU)

maps 30 features of every parameter (gradient, value, momenta, second moments, factored second moments and ratios of
these, each divided by its root mean square over the tensor) to a direction d and a log magnitude e:

    p <- p - s rms(p) d exp(0.001 e) 0.001

Metz et al. 2022 (arXiv:2211.09760); rule and constants from the authors' code google/learned_optimization,
research/general_lopt/hyper_v2.py and learned_optimizers/common.py. The published weights took about 4,000 TPU-months
to meta-train and are not part of trimtab: **with fresh weights this is a rule, not an optimizer that works.** It is
here to be meta-trained, or given weights under the names of `VeLORule.state_dict()`.

Shape suffixes: T tensors of the model, H LSTM width, B networks in the bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError

__all__ = ["VeLO", "VeLORule"]

_MOMENTUM = (0.9, 0.99, 0.999)
_RMS = (0.999,)
_FACTORED = (0.9, 0.99, 0.999)
_TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_FEATURES = 30
_SCALE = 0.001


@dataclass(frozen=True)
class _TensorState:
    """Moments of one tensor; the last dimension holds the decays. `row` is the full second moment of vectors."""

    m: Tensor
    rms: Tensor
    row: Tensor
    col: Tensor


def _two_largest(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the second largest and the largest dimension, later ones first among equals; None for vectors."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    return order[-2], order[-1]


def _rsqrt(x: Tensor) -> Tensor:
    return x.clamp(min=1e-9).rsqrt()


def _squash(x: Tensor) -> Tensor:
    return (1e-8 + (10 * x).abs()).log().clamp(-5, 5) * 0.5


def _truncated(shape: Sequence[int], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    std = fan_in**-0.5
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator))


class VeLORule(nn.Module):
    """The weights of the rule and its one differentiable step.

    Args:
        hidden: H, width of the per-tensor LSTM.
        bank: B, number of small networks.
        generator: for fresh weights; default: seeded with 0.

    Raises:
        UsageError: if hidden or bank is below 1.

    Example:
        >>> sorted(VeLORule(hidden=8, bank=4).state_dict())[:4]
        ['b0', 'b1', 'b2', 'base_bias']
    """

    mix_weight: Tensor
    mix_bias: Tensor
    base_weight: Tensor
    base_bias: Tensor
    lstm_weight: Tensor
    lstm_bias: Tensor
    controls_weight: Tensor
    controls_bias: Tensor
    step_size_weight: Tensor
    step_size_bias: Tensor
    w0: Tensor

    def __init__(self, *, hidden: int = 512, bank: int = 256, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if hidden < 1 or bank < 1:
            raise UsageError(f"hidden and bank must be at least 1, got {hidden} and {bank}.")
        rng = torch.Generator().manual_seed(0) if generator is None else generator
        self.hidden, self.bank = hidden, bank
        for name, inputs, outputs in (
            ("mix", _FEATURES, hidden),
            ("base", _FEATURES, hidden),
            ("lstm", 2 * hidden, 4 * hidden),
            ("controls", hidden, bank),
            ("step_size", hidden, 1),
        ):
            self.register_parameter(f"{name}_weight", _truncated((inputs, outputs), inputs, rng))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(outputs)))
        self.hidden0, self.cell0 = nn.Parameter(torch.zeros(1, hidden)), nn.Parameter(torch.zeros(1, hidden))
        for layer, (inputs, outputs) in enumerate(((_FEATURES, 4), (4, 4), (4, 3))):
            self.register_parameter(f"w{layer}", _truncated((bank, inputs, outputs), inputs, rng))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.zeros(bank, outputs)))

    def start(self, params: Sequence[Tensor], *, num_steps: int) -> dict[str, Any]:
        """Return the state before the first step."""
        weight = self.w0
        tensors = []
        for p in params:
            dims = _two_largest(p.shape)
            zero = p.new_zeros(p.shape, dtype=weight.dtype)
            row, col = (zero, zero[..., :0]) if dims is None else (zero.sum(dim=dims[1]), zero.sum(dim=dims[0]))
            tensors.append(
                _TensorState(
                    *(x.unsqueeze(-1).repeat(*[1] * x.dim(), n) for x, n in ((zero, 3), (zero, 1), (row, 3), (col, 3)))
                )
            )
        half_lives = torch.logspace(1, math.log10(num_steps), 10, dtype=weight.dtype)
        return {
            "step": 0,
            "tensors": [vars(tensor) for tensor in tensors],
            "hidden": self.hidden0.expand(len(params), -1),
            "cell": self.cell0.expand(len(params), -1),
            "loss_decay": (-1 / half_lives).exp().to(weight.device),
            "loss_mean": weight.new_zeros(10),
            "loss_min": weight.new_full((10,), 999999999999.0),
        }

    def update(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], loss: Tensor, state: dict[str, Any], *, num_steps: int
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Return the next parameters and the next state.

        Args:
            params: the model's tensors, in the rule's dtype.
            grads: their gradients.
            loss: the loss they come from.
            state: as from `start`.
            num_steps: length of the run.

        Returns:
            (parameters, state); nothing is changed in place.
        """
        new: dict[str, Any] = {"step": state["step"] + 1, "loss_decay": state["loss_decay"]}
        progress = self._loss_features(loss, state, new)
        grads = [g.clamp(-1000, 1000) for g in grads]
        old = [_TensorState(**tensor) for tensor in state["tensors"]]
        times = progress.new_tensor([math.tanh(10 * (state["step"] / num_steps - t)) for t in _TIMES])
        seen = torch.stack([self._tensor_features(p, t, times, progress) for p, t in zip(params, old, strict=True)])
        mixed = torch.relu(seen @ self.mix_weight + self.mix_bias).amax(dim=0, keepdim=True)
        x = torch.cat([seen @ self.base_weight + self.base_bias + mixed, state["hidden"]], dim=-1)
        i, g, f, o = (x @ self.lstm_weight + self.lstm_bias).chunk(4, dim=-1)
        new["cell"] = (f + 1).sigmoid() * state["cell"] + i.sigmoid() * g.tanh()
        new["hidden"] = o.sigmoid() * new["cell"].tanh()
        controls = new["hidden"] @ self.controls_weight + self.controls_bias
        sizes = new["hidden"] @ self.step_size_weight + self.step_size_bias
        moved, tensors = [], []
        for p, grad, tensor, c, s in zip(params, grads, old, controls, sizes, strict=True):
            features, tensor = self._parameter_features(p, grad, tensor)
            moved.append(p - self._step(p, features, c, s))
            tensors.append(vars(tensor))
        return moved, new | {"tensors": tensors}

    def _loss_features(self, loss: Tensor, state: dict[str, Any], new: dict[str, Any]) -> Tensor:
        decay, count = state["loss_decay"], state["step"]
        # A loss above twice its longest mean is clipped to it.
        highest = loss if count == 0 else (state["loss_mean"] / (1 - decay ** (count + 1))).max()
        loss = torch.minimum(2 * highest.abs(), loss).to(decay)
        new["loss_mean"] = state["loss_mean"] * decay + loss * (1 - decay)
        mean = new["loss_mean"] / (1 - decay ** (count + 1))
        new["loss_min"] = torch.minimum(state["loss_min"], mean)
        if count + 1 <= 2:
            return torch.zeros_like(mean[:-1])
        low = new["loss_min"][:-1]
        return ((mean[:-1] - low) / (mean[1:] - low).clamp(min=1e-8) - 1).clamp(-1, 1)

    @staticmethod
    def _tensor_features(p: Tensor, tensor: _TensorState, times: Tensor, progress: Tensor) -> Tensor:
        norm = _rsqrt(p.square().mean())
        m, rms = (norm * tensor.m).reshape(-1, 3), (norm * tensor.rms).reshape(-1, 1)
        mean_m = m.mean(dim=0, keepdim=True)
        rank = torch.zeros_like(times[:5])
        rank[min(sum(size > 1 for size in p.shape), 4)] = 1
        # The authors' code centres the second moment at the mean of the momenta; so does this.
        var_m, var_rms = (m - mean_m).square().mean(dim=0), (rms - mean_m).square().mean(dim=0)
        return torch.cat([times, progress, _squash(rms.mean(dim=0)), rank, _squash(var_m), _squash(var_rms)])

    @staticmethod
    def _parameter_features(p: Tensor, g: Tensor, tensor: _TensorState) -> tuple[list[Tensor], _TensorState]:
        g1 = g.unsqueeze(-1)
        beta, beta_r, beta_f = (g.new_tensor(decays) for decays in (_MOMENTUM, _RMS, _FACTORED))
        m = beta * tensor.m + (1 - beta) * g1
        rms = beta_r * tensor.rms + (1 - beta_r) * g1.square()
        inverse = (rms + 1e-6).rsqrt()
        square = (g1.square() + 1e-30).expand(*g.shape, 3)
        dims = _two_largest(g.shape)
        if dims is None:
            row = beta_f * tensor.row + (1 - beta_f) * square
            new = _TensorState(m, rms, row, tensor.col)
            fac_g, rows, cols = g1 * _rsqrt(row + 1e-9), row, row
            fac_m = m * row.rsqrt()
        else:
            d1, d0 = dims
            row = beta_f * tensor.row + (1 - beta_f) * square.mean(dim=d0)
            col = beta_f * tensor.col + (1 - beta_f) * square.mean(dim=d1)
            new = _TensorState(m, rms, row, col)
            mean = row.mean(dim=d1 - 1 if d1 > d0 else d1, keepdim=True)
            factor = _rsqrt(row / (mean + 1e-9)).unsqueeze(d0) * _rsqrt(col).unsqueeze(d1)
            fac_g, fac_m = g1 * factor, m * factor
            rows, cols = row.unsqueeze(d0).expand_as(m), col.unsqueeze(d1).expand_as(m)
        features = [g1, g1.clamp(-0.1, 0.1), p.unsqueeze(-1), m, rms, m * inverse, inverse, fac_g, g1 * inverse]
        features += [rows, cols, (rows + 1e-8).rsqrt(), (cols + 1e-8).rsqrt(), fac_m]
        return features, new

    def _step(self, p: Tensor, features: list[Tensor], c: Tensor, s: Tensor) -> Tensor:
        x = torch.cat(features, dim=-1)
        x = x * (1e-5 + x.square().mean(dim=tuple(range(p.dim())), keepdim=True)).rsqrt()
        for layer in range(3):
            w, b = getattr(self, f"w{layer}"), getattr(self, f"b{layer}")
            x = x @ (100 / self.bank * torch.einsum("b,bio->io", c, w)) + 100 / self.bank * (c @ b)
            x = x.relu() if layer < 2 else x
        direction, magnitude = x[..., 0], x[..., 1]
        scale = (p.square().mean() + 1e-9).sqrt()
        return s * scale * direction * (_SCALE * magnitude).exp() * _SCALE


class VeLO(torch.optim.Optimizer):
    """Applies a `VeLORule` to a model; it has no learning rate, only the length of the run.

    p <- p - s rms(p) d exp(0.001 e) 0.001, with s, d and e from the rule's networks.

    Args:
        params: parameters; groups have no options. Those without a gradient stay.
        num_steps: length of the run, at least 1.
        rule: its weights; default: fresh ones, which do not optimize.

    Raises:
        UsageError: if num_steps is below 1.

    Example:
        >>> w = torch.ones(3, requires_grad=True)
        >>> optimizer = VeLO([w], num_steps=10, rule=VeLORule(hidden=8, bank=4))
        >>> loss = w.square().sum()
        >>> loss.backward()
        >>> loss = optimizer.step(lambda: loss)
        >>> bool((w != 1).any())
        True

    References:
        Metz et al. 2022, arXiv:2211.09760; code: google/learned_optimization.
    """

    def __init__(self, params: Iterable[Any], *, num_steps: int, rule: VeLORule | None = None) -> None:
        if num_steps < 1:
            raise UsageError(f"num_steps must be at least 1, got {num_steps}.")
        super().__init__(params, {})
        self.num_steps = num_steps
        self.rule = VeLORule() if rule is None else rule

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss.

        Args:
            closure: computes the loss and its gradients and returns the loss, which the rule looks at; after a backward
                pass of one's own, `step(lambda: loss)`.

        Returns:
            The closure's loss.
        """
        with torch.enable_grad():
            loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        dtype = self.rule.w0.dtype
        # Scalars pass as vectors of one element.
        values = [p.to(dtype) if p.dim() else p.to(dtype).reshape(1) for p in params]
        grads = [
            torch.zeros_like(v) if p.grad is None else p.grad.to(dtype).reshape(v.shape)
            for p, v in zip(params, values, strict=True)
        ]
        state: Any = self.state  # under a name of its own, torch's loader leaves what is in there as it is
        before = state.get("velo") or self.rule.start(values, num_steps=self.num_steps)
        moved, state["velo"] = self.rule.update(
            values, grads, loss.detach().to(dtype), before, num_steps=self.num_steps
        )
        for p, value in zip(params, moved, strict=True):
            if p.grad is not None:
                p.copy_(value.reshape(p.shape))
        return loss


_TESTS = "tests/optim/learned/test_velo.py"
CARD = Card(
    name="velo",
    room="optim",
    summary="VeLO's update rule, to be meta-trained or given weights; without them it does not optimize",
    paper=Paper(
        "VeLO: Training Versatile Learned Optimizers by Scaling Up",
        2022,
        arxiv="2211.09760",
        code="https://github.com/google/learned_optimization",
    ),
    equation="p <- p - s rms(p) d exp(0.001 e) 0.001, (d, e) = MLP_theta(features), theta = 100 mean_b c_b bank_b, "
    "(c, s) = LSTM(tensor features)",
    claim="With the published weights, no hyper-parameter needs tuning. Not claimed of fresh weights.",
    acts_on="optimizer",
    entry="trimtab.optim.learned.velo:VeLO",
    defaults=(Default("rule", None, "ours: a rule with fresh weights, of the paper's size"),),
    verified={
        "equation": (f"{_TESTS}::test_equals_its_equations", f"{_TESTS}::test_meta_gradient_is_right"),
    },
    deviations=(
        "No meta-trained weights are shipped, and converting the published checkpoints has not been tried.",
        "The first of the authors' two mixing layers is left out: its output is never used. Likewise their option to "
        "reuse the first LSTM state ('bugged next LSTM state'), a loss buffer of 10 steps, and a validation feature.",
        "Parameters without a gradient stay, where the authors' code moves all.",
        "LSTM of 512 and bank of 256 as in the authors' large-scale configuration; the class there has 128 and 64.",
        "The gates' order and forget bias of 1 are those of Haiku's LSTM.",
    ),
)
