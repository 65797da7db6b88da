"""PreferenceLossTestCase: what every loss of responses' log-probabilities must hold. Shape suffix: B pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.scalars import to_scalar

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_PAIRS = 6


class PreferenceLossTestCase:
    """Contract of a loss of log-probabilities with `reduction` and `denominator`.

    Subclass it, set `loss` and the names of its tensors, and pytest collects every test below.

    Attributes:
        loss: the loss; wrap a function in `staticmethod`.
        scores: names of its arguments that are log-probabilities, [B]; those of the policy come first.
        policy: how many of them belong to the policy, and so get a gradient.
        lengths: names of its keyword arguments that count tokens, [B].

    Example:
        >>> from trimtab.losses import dpo_loss
        >>> class TestDPO(PreferenceLossTestCase):
        ...     loss = staticmethod(dpo_loss)
        >>> TestDPO().test_gradcheck()
    """

    loss: ClassVar[Callable[..., Tensor]]
    scores: ClassVar[tuple[str, ...]] = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    policy: ClassVar[int] = 2
    lengths: ClassVar[tuple[str, ...]] = ()

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return arguments by name; override to add others of shape [B]."""
        generator = torch.Generator().manual_seed(0)
        found = {
            name: (-8 * torch.rand(_PAIRS, generator=generator, dtype=torch.float64) - 1).to(dtype)
            for name in self.scores
        }
        for name in self.lengths:
            found[name] = torch.randint(2, 9, (_PAIRS,), generator=generator)
        return found

    def _loss(self, arguments: dict[str, Tensor], **options: Any) -> Tensor:
        return type(self).loss(**arguments, **options)

    def _gradients(self, arguments: dict[str, Tensor], **options: Any) -> list[Tensor]:
        leaves = [arguments[name].detach().clone().requires_grad_() for name in self.scores[: self.policy]]
        given = {**arguments, **dict(zip(self.scores, leaves, strict=False))}
        return list(torch.autograd.grad(self._loss(given, **options), leaves))

    def test_gradcheck(self) -> None:
        arguments = self.arguments()
        names = self.scores[: self.policy]

        def of(*leaves: Tensor) -> Tensor:
            return self._loss({**arguments, **dict(zip(names, leaves, strict=True))}, reduction="none")

        assert torch.autograd.gradcheck(of, [arguments[name].requires_grad_() for name in names])

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_computed_in_float32_or_better(self, dtype: torch.dtype) -> None:
        arguments = self.arguments(dtype)
        wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
        loss = self._loss(arguments)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss.double(), self._loss(wide), rtol=1e-5, atol=1e-6)
        assert all(gradient.dtype == dtype for gradient in self._gradients(arguments))

    def test_reductions_agree(self) -> None:
        arguments = self.arguments()
        each = self._loss(arguments, reduction="none")
        assert each.shape == (_PAIRS,)
        torch.testing.assert_close(self._loss(arguments, reduction="sum"), each.sum())
        torch.testing.assert_close(self._loss(arguments), each.mean())
        torch.testing.assert_close(self._loss(arguments, denominator=2.5), each.sum() / 2.5)

    @pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (1,) * _PAIRS], ids=str)
    def test_micro_batches_add_up(self, sizes: tuple[int, ...]) -> None:
        arguments = self.arguments()
        whole = self._gradients(arguments)
        parts = {name: value.split(sizes) for name, value in arguments.items()}
        found = [
            self._gradients({name: value[place] for name, value in parts.items()}, denominator=_PAIRS)
            for place in range(len(sizes))
        ]
        for index, gradient in enumerate(whole):
            torch.testing.assert_close(torch.cat([part[index] for part in found]), gradient)

    def test_nothing_to_compare(self) -> None:
        empty = {name: value[:0] for name, value in self.arguments().items()}
        assert to_scalar(self._loss(empty)) == 0
        assert all(gradient.numel() == 0 for gradient in self._gradients(empty))

    @pytest.mark.parametrize("size", [1e3, 1e6])
    def test_extreme_scores_have_finite_gradients(self, size: float) -> None:
        arguments = self.arguments()
        for index, name in enumerate(self.scores):
            arguments[name] = torch.full((_PAIRS,), -size if index % 2 else -1.0, dtype=torch.float64)
        assert math.isfinite(to_scalar(self._loss(arguments)))
        assert all(bool(gradient.isfinite().all()) for gradient in self._gradients(arguments))

    def test_what_does_not_fit_is_refused(self) -> None:
        arguments = self.arguments()
        name = self.scores[-1]
        with pytest.raises(UsageError, match="one shape"):
            self._loss({**arguments, name: arguments[name][:-1]})
        with pytest.raises(UsageError, match="floating-point"):
            self._loss({**arguments, name: torch.zeros(_PAIRS, dtype=torch.int64)})
