"""Forward-Forward: each layer learns to answer real inputs with high goodness and false ones with low goodness.

The label is part of the input: positive inputs carry the right one, negative inputs a wrong one. For each layer

    x~ = x / rms(x),   a = f(W x~ + b),   g = sum_j a_j^2,   J = softplus(theta - g+) + softplus(g- - theta)

is minimised by gradients within the layer; the length of a, its goodness, is normalised away before the next layer. The
predicted class is the label of the highest goodness, added up over all layers but the first. Hinton 2022
(arXiv:2212.13345), with the constants of his Matlab code; Tosato et al. 2023 (arXiv:2305.18353), authors' code
NiccoloTosato/EmergentRepresentations at cb1aa80, find sparse, category-specific ensembles of units in such nets: see
`hoyer_sparsity` and `class_selectivity`. Their variant is goodness="norm", normalize="l2", threshold=3 with Adam.

Shape suffixes: B batch, H hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim.rules._rule import OptimizerFactory, TrainingRule

__all__ = ["ForwardForward", "class_selectivity", "hoyer_sparsity"]

_TINY = math.exp(-50)
"""Hinton's guard against a division by zero."""


def hoyer_sparsity(a_BH: Tensor) -> Tensor:
    """Return how few units carry a sample's activity: 0 if all are alike, 1 if one alone is active.

    mean over samples of (sqrt(H) - ||a||_1 / ||a||_2) / (sqrt(H) - 1); samples without any activity do not count.

    Args:
        a_BH: [B, H], activities, H >= 2.

    Returns:
        A scalar in [0, 1].

    Raises:
        UsageError: if the shape is not [B, H] with H >= 2.

    Example:
        >>> hoyer_sparsity(torch.eye(4)), hoyer_sparsity(torch.ones(2, 4))
        (tensor(1.), tensor(0.))

    References:
        Tosato et al. 2023, arXiv:2305.18353; analysis/analysis.py of the authors' code (sparseness).
    """
    if a_BH.dim() != 2 or a_BH.shape[1] < 2:
        raise UsageError(f"hoyer_sparsity needs [B, H] with H of at least 2, got shape {tuple(a_BH.shape)}.")
    root = math.sqrt(a_BH.shape[1])
    return ((root - a_BH.norm(p=1, dim=1) / a_BH.norm(p=2, dim=1)) / (root - 1)).nanmean()


def class_selectivity(a_BH: Tensor, y_B: Tensor) -> Tensor:
    """Return how much more the units answer their best class than the others, the mean over units.

    (m_best - m_others) / (m_best + m_others), with m the mean activity in a class; m_others is the mean over the other
    classes. 0: the unit answers all classes alike; 1: one class only. Units that never answer do not count.

    Args:
        a_BH: [B, H], activities, not negative.
        y_B: [B], class indices; two classes at least.

    Returns:
        A scalar in [0, 1].

    Raises:
        UsageError: if there are fewer than two classes.

    Example:
        >>> class_selectivity(torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        tensor(0.5000)

    References:
        Tosato et al. 2023, arXiv:2305.18353 (category-specific ensembles; the index is the usual one, not theirs).
    """
    classes = torch.unique(y_B)
    if len(classes) < 2:
        raise UsageError(f"class_selectivity needs samples of two classes at least, got {len(classes)}.")
    means_CH = torch.stack([a_BH[y_B == c].mean(dim=0) for c in classes])
    best = means_CH.amax(dim=0)
    others = (means_CH.sum(dim=0) - best) / (len(classes) - 1)
    return ((best - others) / (best + others)).nanmean()


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.005, momentum=0.9, dampening=0.9, weight_decay=0.002)


class ForwardForward(TrainingRule):
    """Train an `nn.Sequential` of hidden layers by the Forward-Forward algorithm.

    J = softplus(theta - g+) + softplus(g- - theta) in each layer, with g = sum_j a_j^2. There is no output layer: the
    class is the label that gives the highest goodness. Inputs are flattened; the label stands in their first `classes`
    entries, which must hold nothing of worth (an image's border), or is set before them.

    Args:
        model: blocks of Linear layers and activations, without an output layer; the first one takes the flattened
            input, or `classes` entries more with `place="before"`.
        classes: number of classes.
        optimizer: makes a block's optimizer from its parameters; default SGD with lr 0.005, momentum and dampening 0.9
            and weight decay 0.002.
        place: `"over"`: the one-hot label takes the place of the first entries of x; `"before"`: it comes before them.
        goodness: `"squares"`: sum_j a_j^2; `"norm"`: its square root.
        threshold: theta; default the number of units of the layer.
        normalize: `"rms"`: a layer's input is divided by its root mean square; `"l2"`: by its Euclidean norm.
        peer_normalization: strength with which the mean activity of a unit is drawn to that of its layer, which
            revives units that never answer; 0 for none.
        seed: of the wrong labels.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        >>> rule = ForwardForward(model, 3, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        >>> x, y = torch.eye(12)[[4, 6, 8]], torch.tensor([0, 1, 2])
        >>> for _ in range(60):
        ...     loss = rule.step(x, y)
        >>> rule.predict(x)
        tensor([0, 1, 2])

    References:
        Hinton 2022, arXiv:2212.13345, and his Matlab code; Tosato et al. 2023, arXiv:2305.18353.
    """

    def __init__(
        self,
        model: nn.Sequential,
        classes: int,
        *,
        optimizer: OptimizerFactory = _sgd,
        place: str = "over",
        goodness: str = "squares",
        threshold: float | None = None,
        normalize: str = "rms",
        peer_normalization: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, seed, (nn.Linear,))
        if classes < 2:
            raise UsageError(f"classes must be at least 2, got {classes}.")
        if others := [part for part in self.blocks[0].before if not isinstance(part, nn.Flatten)]:
            raise UsageError(f"the model must start at a Linear layer, got {type(others[0]).__name__} before it.")
        if threshold is not None and not threshold > 0:
            raise UsageError(f"threshold must be above 0, got {threshold}: Hinton takes the number of units.")
        if not peer_normalization >= 0:
            raise UsageError(f"peer_normalization must be 0 or more, got {peer_normalization}: Hinton takes 0.03.")
        self.classes = classes
        self.place = choose("place", place, ("over", "before"))
        self.goodness = choose("goodness", goodness, ("squares", "norm"))
        self.threshold = threshold
        self.normalize = choose("normalize", normalize, ("rms", "l2"))
        self.peer_normalization = peer_normalization
        # Running means of the units' activities.
        self.tensors = [torch.full_like(block.layer.weight[:, 0], 0.5).detach() for block in self.blocks]  # type: ignore[index]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train every layer on one batch: x [B, ...], with its labels and with wrong ones.

        Args:
            x: [B, ...], the inputs.
            y: [B], class indices.

        Returns:
            J before the update, the mean over layers.
        """
        shift = torch.randint(1, self.classes, (len(y),), generator=self.generator).to(y.device)
        inputs = torch.cat([self._labelled(x, y), self._labelled(x, (y + shift) % self.classes)]).detach()
        half, total = len(y), x.new_zeros(())
        for index, block in enumerate(self.blocks):
            with torch.enable_grad():
                z = block.layer(self._unit(inputs))
                a = z
                for module in block.after:
                    a = module(a)
                g = self._goodness(a)
                theta = a.shape[1] if self.threshold is None else self.threshold
                loss = F.softplus(theta - g[:half]).mean() + F.softplus(g[half:] - theta).mean()
                objective = loss - self._peer_term(index, z[:half], a[:half])
            self._update(index, objective)
            inputs, total = a.detach(), total + loss.detach()
        return total / len(self.blocks)

    def scores(self, x: Tensor) -> Tensor:
        """Return the goodness of every label, [B, classes], added up over all layers but the first.

        Args:
            x: [B, ...], the inputs.
        """
        first = 1 if len(self.blocks) > 1 else 0
        columns = []
        for label in range(self.classes):
            y = torch.full((len(x),), label, device=x.device)
            columns.append(torch.stack([self._goodness(a) for a in self.hidden(x, y)[first:]]).sum(dim=0))
        return torch.stack(columns, dim=1)

    def hidden(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the activities of every layer, before normalisation, for inputs with given labels.

        Args:
            x: [B, ...], the inputs.
            y: [B], the labels to give them.

        Returns:
            [B, H] for every layer.
        """
        activities: list[Tensor] = []
        a = self._labelled(x, y)
        for block in self.blocks:
            a = block.layer(self._unit(a))
            for module in block.after:
                a = module(a)
            activities.append(a)
        return activities

    def _labelled(self, x: Tensor, y: Tensor) -> Tensor:
        flat = x.flatten(1)
        rest = flat[:, self.classes :] if self.place == "over" else flat
        return torch.cat([F.one_hot(y, self.classes).to(flat.dtype), rest], dim=1)

    def _unit(self, a: Tensor) -> Tensor:
        if self.normalize == "l2":
            return F.normalize(a, dim=1)
        return a / (_TINY + a.square().mean(dim=1, keepdim=True).sqrt())

    def _goodness(self, a: Tensor) -> Tensor:
        squares = a.square().sum(dim=1)
        # The norm's gradient at 0 is not finite.
        return squares if self.goodness == "squares" else (squares + 1e-12).sqrt()

    def _peer_term(self, index: int, z: Tensor, a: Tensor) -> Tensor:
        """What raises units below their layer's mean activity; on z, so that it reaches units that are off."""
        mean = self.tensors[index].lerp_(a.detach().mean(dim=0), 0.1)
        # Twice Hinton's strength, and half his learning rate: his gradient of the goodness leaves out the factor 2.
        return 2 * self.peer_normalization * (z * (mean.mean() - mean)).sum() / len(z)


CARD = Card(
    name="forward-forward",
    room="optim",
    summary="trains each layer by itself to tell right from wrong labels by the size of its activity",
    paper=Paper("The Forward-Forward Algorithm: Some Preliminary Investigations", 2022, arxiv="2212.13345"),
    equation="x~ = x / rms(x), a = f(W x~ + b), g = sum_j a_j^2, J = softplus(theta - g+) + softplus(g- - theta)",
    claim=(
        "Learns digits without a backward pass across layers; its hidden units form sparse, category-specific "
        "ensembles that cross-entropy nets lack (Tosato et al. 2023, arXiv:2305.18353)."
    ),
    acts_on="optimizer",
    entry="trimtab.optim.rules.forward_forward:ForwardForward",
    defaults=(
        Default("optimizer: SGD's lr", 0.005, "Hinton's Matlab code, epsilon 0.01 on half the gradient"),
        Default("optimizer: SGD's momentum and dampening", 0.9, "Hinton's Matlab code, delay"),
        Default("optimizer: SGD's weight decay", 0.002, "Hinton's Matlab code, wc 0.001 at twice the rate"),
        Default("place", "over", "Hinton 2022, section 3.3"),
        Default("goodness", "squares", "Hinton 2022, section 2"),
        Default("threshold", None, "Hinton's Matlab code: the number of units"),
        Default("normalize", "rms", "Hinton's Matlab code, ffnormrows"),
        Default("peer_normalization", 0.03, "Hinton's Matlab code, lambdamean"),
        Default("seed", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/rules/test_forward_forward.py::test_step_equals_hintons_update",
            "tests/optim/rules/test_forward_forward.py::test_measures_by_hand",
        ),
        "claim": (
            "tests/optim/rules/test_forward_forward.py::test_learns_digits",
            "tests/optim/rules/test_forward_forward.py::test_units_are_sparse_and_selective",
        ),
    },
    deviations=(
        "Hinton's gradient of the goodness leaves out the factor 2: here the loss is differentiated as written, with "
        "half his learning rate and twice his weight cost and peer normalisation, which is the same update. His weight "
        "cost is not smoothed with the gradients and spares the biases; torch's SGD smooths it and takes in both.",
        "Wrong labels are uniform; Hinton's code draws them from a softmax on the hidden layers (hard negatives), "
        "which it trains beside them.",
        "The label is one in the first entries as in Hinton's code (label strength 1); Tosato et al. add up a softmax "
        "over labels for each layer to predict, here goodness itself is added up, as Hinton does.",
    ),
)
