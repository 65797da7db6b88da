"""A nowcaster: a small network that predicts future weights from recent checkpoints, trained on past training runs.

Each parameter is an edge between neurons. Its last c values, scaled by the mean m and standard deviation sd of its
tensor over all c checkpoints, are embedded; messages pass between edges that share a neuron; a head then names the
change at each of K horizons at once:

    e    = A x + b_type,   x = (theta_{t-c+1..t} - m) / (sd + 1e-6)
    n_i  = silu( N [ mean_j e_ij ; e_i ; mean_k e_ki ] )                (incoming weights, bias, outgoing weights)
    e_ij = e_ij + silu(U [ e_ij ; n_i ; n_j ]),   e_i = e_i + silu(U [ e_i ; n_i ; 0 ])
    theta_{t+k} = m + (sd + 1e-6) (x_t + head(e)_k)

It is trained to minimise the mean absolute error of the scaled future over all horizons. Without a chain of layers
there are no messages: the network then sees one parameter at a time.

After NiNo, Knyazev et al. 2025 (arXiv:2409.04434); authors' code SamsungSAILMontreal/nino. The scaling, residual, head,
loss and training settings are theirs; the message passing is a smaller one (see the Card).

Shape suffixes: C checkpoints of context, H hidden, K horizons, T length of a trajectory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.scalars import to_scalar

__all__ = ["Nowcaster", "Trajectory", "linear_chain", "train_nowcaster"]

Chain = Sequence[tuple[int, int | None]]
_EPS = 1e-6


def linear_chain(model: nn.Module) -> list[tuple[int, int | None]]:
    """Return where the layers of a fully connected model are among its parameters: (weight, bias) positions, in order.

    Args:
        model: its `nn.Linear` layers must feed each other in the order of registration, as in `nn.Sequential`.

    Returns:
        One pair per layer; empty if the widths of the layers do not match up.

    Example:
        >>> linear_chain(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)))
        [(0, 1), (2, None)]
    """
    position = {id(p): index for index, p in enumerate(model.parameters())}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if any(a.out_features != b.in_features for a, b in itertools.pairwise(layers)):
        return []
    return [(position[id(m.weight)], None if m.bias is None else position[id(m.bias)]) for m in layers]


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints of one training run: a tensor [T, *shape] per parameter, and the chain of layers if there is one."""

    states: Sequence[Tensor]
    chain: Chain = ()


@dataclass(frozen=True)
class _Bound:
    nowcaster: Nowcaster
    chain: Chain

    def predict(self, checkpoints: Sequence[Tensor], k: int) -> list[Tensor]:
        return self.nowcaster.predict(checkpoints, k, chain=self.chain)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class Nowcaster(nn.Module):
    """Predicts each parameter's value 1 to K checkpoints ahead from its last C ones.

    Args:
        context: C, at least 2.
        horizon: K, at least 1.
        hidden: H, at least 1.
        layers: rounds of message passing, at least 0.
        generator: for the initial weights; default: seeded with 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> nowcaster = Nowcaster(context=3, horizon=4, hidden=8)
        >>> checkpoints = [torch.linspace(0, 1, 3).unsqueeze(1) * torch.ones(1, 2)]
        >>> [p.shape for p in nowcaster.predict(checkpoints, k=2)]
        [torch.Size([2])]

    References:
        Knyazev et al. 2025, arXiv:2409.04434; code: SamsungSAILMontreal/nino.
    """

    def __init__(
        self,
        *,
        context: int = 5,
        horizon: int = 40,
        hidden: int = 128,
        layers: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if context < 2 or horizon < 1 or hidden < 1 or layers < 0:
            raise UsageError(
                f"context must be at least 2, horizon and hidden at least 1 and layers at least 0, got {context}, "
                f"{horizon}, {hidden} and {layers}."
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.config = {"context": context, "horizon": horizon, "hidden": hidden, "layers": layers}
        self.embed = _linear(context, hidden, generator)
        self.types = nn.Parameter(0.02 * torch.randn(3, hidden, generator=generator))  # scalar, vector, matrix or more
        self.nodes = nn.ModuleList(_linear(3 * hidden, hidden, generator) for _ in range(layers))
        self.edges = nn.ModuleList(_linear(3 * hidden, hidden, generator) for _ in range(layers))
        self.head = nn.Sequential(_linear(hidden, hidden, generator), nn.SiLU(), _linear(hidden, horizon, generator))

    def forward(self, scaled: Sequence[Tensor], chain: Chain = ()) -> list[Tensor]:
        """Return the scaled future.

        Args:
            scaled: per parameter its scaled checkpoints [*shape, C], oldest first.
            chain: positions (weight, bias) of the layers among them.

        Returns:
            Per parameter [*shape, K].
        """
        e = [self.embed(x) + self.types[min(x.dim() - 1, 2)] for x in scaled]
        for node, edge in zip(self.nodes, self.edges, strict=True):
            e = self._messages(e, chain, node, edge) if chain else e
        return [x[..., -1:] + self.head(h) for x, h in zip(scaled, e, strict=True)]

    @staticmethod
    def _messages(e: list[Tensor], chain: Chain, node: nn.Module, edge: nn.Module) -> list[Tensor]:
        e = list(e)
        weights = [e[w] for w, _ in chain]  # [out, in, H]
        biases = [None if b is None else e[b] for _, b in chain]
        widths = [weights[0].shape[1], *[w.shape[0] for w in weights]]
        none = [weights[0].new_zeros(width, weights[0].shape[-1]) for width in widths]
        incoming = [none[0], *[w.mean(dim=1) for w in weights]]
        outgoing = [*[w.mean(dim=0) for w in weights], none[-1]]
        own = [none[0], *[zero if b is None else b for b, zero in zip(biases, none[1:], strict=True)]]
        n = [F.silu(node(torch.cat(parts, dim=-1))) for parts in zip(incoming, own, outgoing, strict=True)]
        for layer, (w, b) in enumerate(chain):
            ends, starts = n[layer + 1].unsqueeze(1), n[layer].unsqueeze(0)
            both = [weights[layer], ends.expand_as(weights[layer]), starts.expand_as(weights[layer])]
            e[w] = weights[layer] + F.silu(edge(torch.cat(both, dim=-1)))
            if b is not None:
                parts = [e[b], n[layer + 1], torch.zeros_like(e[b])]
                e[b] = e[b] + F.silu(edge(torch.cat(parts, dim=-1)))
        return e

    def scale(self, checkpoints: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return the checkpoints [C, *shape] scaled by tensor as [*shape, C], and the (m, sd + eps) to undo it."""
        scaled, scales = [], []
        for theta in checkpoints:
            theta = theta.to(self.types)
            m, sd = theta.mean(), theta.std() + _EPS
            scaled.append(((theta - m) / sd).movedim(0, -1))
            scales.append((m, sd))
        return scaled, scales

    @torch.no_grad()
    def predict(self, checkpoints: Sequence[Tensor], k: int, *, chain: Chain = ()) -> list[Tensor]:
        """Return the parameters k checkpoints after the last one.

        Args:
            checkpoints: per parameter [C, *shape], oldest first.
            k: 1 to K.
            chain: positions (weight, bias) of the layers among them, as `linear_chain` gives them.

        Returns:
            Per parameter [*shape], in its dtype.

        Raises:
            UsageError: if there are not C checkpoints or k is out of range.
        """
        if any(len(theta) != self.config["context"] for theta in checkpoints):
            raise UsageError(f"the nowcaster needs {self.config['context']} checkpoints, got {len(checkpoints[0])}.")
        if not 1 <= k <= self.config["horizon"]:
            raise UsageError(f"k must be between 1 and the nowcaster's horizon {self.config['horizon']}, got {k}.")
        scaled, scales = self.scale(checkpoints)
        future = self(scaled, chain)
        return [
            (m + sd * f[..., k - 1]).to(theta) for f, (m, sd), theta in zip(future, scales, checkpoints, strict=True)
        ]

    def on(self, model: nn.Module) -> _Bound:
        """Return the predictor for one model's parameters, with messages along its linear layers: see `Nowcasting`."""
        return _Bound(self, linear_chain(model))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and sizes to a file."""
        torch.save({"config": self.config, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Nowcaster:
        """Read what `save` wrote; nothing but tensors and numbers is read."""
        saved = torch.load(path, weights_only=True, map_location="cpu")
        nowcaster = cls(**saved["config"])
        nowcaster.load_state_dict(saved["state"])
        return nowcaster


def train_nowcaster(
    nowcaster: Nowcaster,
    trajectories: Iterable[Trajectory],
    *,
    generator: torch.Generator,
    steps: int = 20_000,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    batch: int = 4,
    clip: float = 5.0,
) -> list[float]:
    """Train a nowcaster in place on past training runs, by AdamW with a cosine schedule.

    Args:
        nowcaster: what is trained.
        trajectories: runs with at least C + 1 checkpoints each, at the spacing that it will see.
        generator: chooses runs and starts.
        steps: training steps, at least 1.
        lr: first learning rate, positive.
        weight_decay: at least 0.
        batch: windows in a step, at least 1.
        clip: largest gradient norm.

    Returns:
        The loss of each step: mean absolute error of the scaled future.

    Raises:
        UsageError: if there is no trajectory or one is too short.
    """
    runs = list(trajectories)
    context, horizon = nowcaster.config["context"], nowcaster.config["horizon"]
    if not runs:
        raise UsageError("trajectories must hold at least one run, got none.")
    if (shortest := min(len(run.states[0]) for run in runs)) <= context:
        raise UsageError(f"every run must have at least {context + 1} checkpoints, got one with {shortest}.")
    optimizer = torch.optim.AdamW(nowcaster.parameters(), lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-6)
    losses = []
    for _ in range(steps):
        total, count = torch.zeros(()), 0
        for _ in range(batch):
            run = runs[int(torch.randint(len(runs), (), generator=generator))]
            start = int(torch.randint(len(run.states[0]) - context, (), generator=generator))
            window = [theta[start : start + context + horizon] for theta in run.states]
            scaled, scales = nowcaster.scale([theta[:context] for theta in window])
            for future, theta, (m, sd) in zip(nowcaster(scaled, run.chain), window, scales, strict=True):
                target = ((theta[context:].to(future) - m) / sd).movedim(0, -1)
                total = total + (future[..., : target.shape[-1]] - target).abs().sum()
                count += target.numel()
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nowcaster.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(to_scalar(loss))
    return losses


_TESTS = "tests/optim/learned/test_nowcaster.py"
CARD = Card(
    name="nino",
    room="optim",
    summary="a network over the neuron graph, trained on past runs, jumps the weights ahead once per period",
    paper=Paper(
        "Accelerating Training with Neuron Interaction and Nowcasting Networks",
        2025,
        arxiv="2409.04434",
        code="https://github.com/SamsungSAILMontreal/nino",
    ),
    equation="theta_{t+k} = m + sd (x_t + head(e)_k), e from the scaled last c checkpoints x and messages over neurons",
    claim="Reaches Adam's loss in up to 50 % fewer steps in vision and language tasks.",
    acts_on="optimizer",
    entry="trimtab.optim.learned.nowcaster:Nowcaster",
    defaults=(
        Default("context", 5, "authors' code, optim/model.py: ctx"),
        Default("horizon", 40, "authors' code, optim/model.py: max_seq_len"),
        Default("hidden", 128, "authors' code, optim/model.py: hid"),
        Default("layers", 3, "authors' code, optim/model.py: layers"),
        Default("generator", None, "ours: seeded with 0"),
    ),
    verified={
        "equation": (f"{_TESTS}::test_equals_its_equations", f"{_TESTS}::test_commutes_with_permutations_of_neurons"),
        "claim": (f"{_TESTS}::test_predicts_unseen_runs_better_than_a_line",),
    },
    deviations=(
        "Messages are means through one shared linear map per round, over fully connected chains; the authors' graph "
        "network modulates messages by edges, adds Laplacian and token position encodings to the neurons and covers "
        "convolutions and attention. Parameters outside a chain get no messages here.",
        "Elements of convolution kernels are single parameters; the authors group up to 9 to an edge.",
        "Three types of parameters (scalar, vector, matrix) are told apart; the authors' code has 15.",
        "Measured by benchmarks/learned_optimizers.py on teacher-student tasks with new teachers (12 tasks, Adam's "
        "rate and all horizons tuned apart): with a constant rate, Adam's loss after 0.82 (width as in training) and "
        "0.88 (wider) of its steps, median; without messages 0.94 and 0.97, by the line 1.04 and 1.05. With a rate "
        "that decays to 0: no evidence of a gain (0.99 and 1.02 of the steps; last loss 1.00 and 1.32 of Adam's).",
        "No weights are shipped and the authors' checkpoints do not fit: train one on runs of your own.",
    ),
)
