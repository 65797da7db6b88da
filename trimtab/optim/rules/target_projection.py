"""Target projection SGD: each layer learns by itself to answer a random code of the label, in forward passes only.

    J_i = 1/2 ||P_i y* - y_i||^2  (l2),   ||P_i y* - y_i||_1  (l1),   w_i <- w_i - eta dJ_i/dw_i

y* is the one-hot label, P_i a fixed random matrix and y_i the layer's output on a detached input: its update is
(P_i y* - y_i) * sigma'(z_i) against the input, with the sign of the residual for l1. The last layer learns the label
itself, with any loss. A recurrent layer's last state, or each state, has the target. One layer's graph is all that is
ever held. Lomnitz, Daniels, Zhang, Piacentino 2022
(arXiv:2208.08503); it generalises direct random target projection (Frenkel et al. 2019, arXiv:1909.01311). No code of
the authors is public; loss and update are checked against a third-party reading of the paper, the rest is recalled.

Shape suffixes: B batch, L time steps, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim.rules._rule import Block, OptimizerFactory, TrainingRule

__all__ = ["HiddenStates", "TargetProjection"]


class HiddenStates(nn.Module):
    """Pick the hidden states out of what `nn.RNN` returns, so that it can stand in an `nn.Sequential`.

    Args:
        last: return the last time step's state [B, H] only, in place of all of them [B, L, H].

    Example:
        >>> model = nn.Sequential(nn.RNN(8, 16, batch_first=True), HiddenStates(), nn.Linear(16, 10))
        >>> model(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 10])

    References:
        Lomnitz et al. 2022, arXiv:2208.08503.
    """

    def __init__(self, *, last: bool = True) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Return [B, H], or [B, L, H]."""
        states = x[0] if isinstance(x, tuple) else x
        return states[:, -1] if self.last else states


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


class TargetProjection(TrainingRule):
    """Train an `nn.Sequential` layer by layer towards random projections of the labels.

    J_i = 1/2 ||P_i y* - y_i||^2, summed over units or channels, the mean over the batch and over positions; the entries
    of P_i are uniform in (-1, 1), the range of tanh. A block starts at a layer of weights and holds what follows it
    (activation, pooling); its output is what has the target: with `HiddenStates()` that is the last hidden state.

    Args:
        model: blocks of Linear, convolution or `nn.RNN` layers (one layer, batch_first, followed by `HiddenStates`);
            the last block gives the logits.
        classes: number of classes.
        optimizer: makes a block's optimizer from its parameters; default SGD with lr 0.01.
        loss: of hidden blocks: `"l2"`, `"l1"`, or a function of (output, target) that returns a scalar.
        output_loss: of the last block, a function of (logits, y).
        through_time: let the gradient of a recurrent layer reach back through its own time steps; without it each step
            learns by itself.
        seed: of the projections, drawn at the first step.

    Raises:
        UsageError: if an option breaks its rule, or the model has a recurrent layer of another kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> rule = TargetProjection(model, 3, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
        >>> x, y = torch.eye(4)[:3], torch.tensor([0, 1, 2])
        >>> for _ in range(50):
        ...     loss = rule.step(x, y)
        >>> rule.predict(x)
        tensor([0, 1, 2])

    References:
        Lomnitz et al. 2022, arXiv:2208.08503; Frenkel et al. 2019, arXiv:1909.01311.
    """

    def __init__(
        self,
        model: nn.Sequential,
        classes: int,
        *,
        optimizer: OptimizerFactory = _sgd,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "l2",
        output_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        through_time: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, seed)
        if classes < 2:
            raise UsageError(f"classes must be at least 2, got {classes}.")
        for block in self.blocks:
            _check_recurrent(block)
        self.classes = classes
        self.loss = loss if callable(loss) else choose("loss", loss, ("l1", "l2"))
        self.output_loss = output_loss
        self.through_time = through_time

    def step(self, x: Tensor, y: Tensor, *, only: int | None = None) -> Tensor:
        """Train every block on one batch, or one block only.

        Args:
            x: [B, ...], the inputs.
            y: [B], class indices.
            only: index of the block to train, for training layer after layer; default all, each on the output that the
                one below had before its update.

        Returns:
            The last block's loss before its update; with `only`, that block's.

        Raises:
            UsageError: if there is no such block.
        """
        last = len(self.blocks) - 1
        if only is not None and not 0 <= only <= last:
            raise UsageError(f"only must be a block's index from 0 to {last}, got {only}.")
        code = F.one_hot(y, self.classes).to(next(self.model.parameters()).dtype)
        a, loss = x.detach(), x.new_zeros(())
        for index in range(last + 1 if only is None else only + 1):
            if only is not None and index < only:
                with torch.no_grad():
                    # The projections are drawn in the blocks' order, whichever is trained.
                    a = self._forward(index, a)
                    self._target(index, a, code)
            else:
                a, loss = self._train(index, a, y, code)
        return loss

    def _train(self, index: int, a: Tensor, y: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Train a block; return its output and its loss, without their graph."""
        with torch.enable_grad():
            out = self._forward(index, a)
            if index == len(self.blocks) - 1:
                loss = self.output_loss(out, y)
            else:
                target = self._target(index, out, code)
                loss = self.loss(out, target) if callable(self.loss) else self._distance(index, out, target)
        self._update(index, loss)
        return out.detach(), loss.detach()

    def _forward(self, index: int, a: Tensor) -> Tensor:
        block = self.blocks[index]
        rnn = block.layer
        if self.through_time or not isinstance(rnn, nn.RNN):
            return block(a)
        for module in block.before:
            a = module(a)
        h, states = a.new_zeros(len(a), rnn.hidden_size), []
        for t in range(a.shape[1]):
            h = _cell(rnn, a[:, t], h.detach())
            states.append(h)
        a = torch.stack(states, dim=1)
        for module in block.after:
            a = module(a)
        return a

    def _target(self, index: int, out: Tensor, code: Tensor) -> Tensor:
        """Return P_i y* in the shape of the block's output; for a sequence, the same at every time step."""
        sequence = out.dim() == 3 and isinstance(self.blocks[index].layer, nn.RNN)
        width = out.shape[-1] if sequence else out[0].numel()
        if len(self.tensors) == index:
            self.tensors.append(2 * self._random(torch.rand, self.classes, width) - 1)
        target = code @ self.tensors[index]
        return target.unsqueeze(1).expand_as(out) if sequence else target.reshape(out.shape)

    def _distance(self, index: int, out: Tensor, target: Tensor) -> Tensor:
        """Return J, summed over the layer's units or channels, the mean over samples and positions."""
        residual = target - out
        total = residual.abs().sum() if self.loss == "l1" else 0.5 * residual.square().sum()
        return total * _units(self.blocks[index].layer) / out.numel()


def _units(layer: nn.Module) -> int:
    """Number of units or channels of a layer."""
    sizes = (getattr(layer, name, None) for name in ("out_features", "out_channels", "hidden_size"))
    return next(size for size in sizes if size is not None)


def _cell(rnn: nn.RNN, x: Tensor, h: Tensor) -> Tensor:
    """One time step of a single-layer nn.RNN."""
    biases = (rnn.bias_ih_l0, rnn.bias_hh_l0) if rnn.bias else (None, None)
    z = F.linear(x, rnn.weight_ih_l0, biases[0]) + F.linear(h, rnn.weight_hh_l0, biases[1])  # type: ignore[arg-type]
    return torch.tanh(z) if rnn.nonlinearity == "tanh" else torch.relu(z)


def _check_recurrent(block: Block) -> None:
    rnn = block.layer
    if not isinstance(rnn, nn.RNN):
        return
    if rnn.num_layers > 1 or rnn.bidirectional or not rnn.batch_first or rnn.dropout:
        raise UsageError(
            "target projection needs an nn.RNN of one layer, one direction and batch_first=True: stack several with "
            "HiddenStates(last=False) between them."
        )
    if not block.after or not isinstance(block.after[0], HiddenStates):
        raise UsageError("target projection needs HiddenStates after an nn.RNN, to pick what the next layer sees.")


CARD = Card(
    name="tpsgd",
    room="optim",
    summary="trains each layer by itself towards a random projection of the label, in forward passes only",
    paper=Paper("Learning with Local Gradients at the Edge", 2022, arxiv="2208.08503"),
    equation="J_i = 1/2 ||P_i y* - y_i||^2 or ||P_i y* - y_i||_1; w_i <- w_i - eta dJ_i/dw_i, layer by layer",
    claim="Within 5 % of backpropagation on shallow dense, convolutional and recurrent nets, in less memory.",
    acts_on="optimizer",
    entry="trimtab.optim.rules.target_projection:TargetProjection",
    defaults=(
        Default("optimizer: SGD's lr", 0.01, "ours: the paper's could not be checked"),
        Default("loss", "l2", "the paper's first form"),
        Default(
            "output_loss: function", "cross_entropy", "recalled: the last layer has the label itself as its target"
        ),
        Default("through_time", True, "ours: without it a recurrent net falls far behind on digits"),
        Default("seed", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/rules/test_target_projection.py::test_step_equals_plain_numpy",
            "tests/optim/rules/test_target_projection.py::test_recurrent_step_equals_plain_numpy",
        ),
        "claim": (
            "tests/optim/rules/test_target_projection.py::test_learns_digits",
            "tests/optim/rules/test_target_projection.py::test_holds_one_layer_of_activations",
        ),
    },
    deviations=(
        "Recalled, not checked against the paper's text (the authors' code is not public): the distribution of P_i, "
        "here uniform in (-1, 1); how a recurrent layer is trained, here on the target of its last state through its "
        "own time steps, or of each state; that a convolution's target is drawn for its whole output map.",
        "All blocks are updated on each batch, the next one seeing the output from before the update; training layer "
        "after layer is step(x, y, only=i).",
        "J has the factor 1/2 that makes its gradient the printed update (P y* - y) * sigma', and is the mean over "
        "positions of a convolution, so that dense and convolutional layers share a learning rate.",
    ),
)
