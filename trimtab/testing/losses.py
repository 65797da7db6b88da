"""LossTestCase: what every loss of (logits, class indices) must hold.

Shape suffixes: B samples, V classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.scalars import to_scalar
from trimtab.testing.ranks import run_ranks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class LossTestCase:
    """Contract of a loss `loss(logits, targets, *, reduction="mean", denominator=None)`, classes in the last dimension.

    Subclass it, set `loss`, and pytest collects every test below.

    Attributes:
        loss: the loss; wrap a function in `staticmethod`.
        ignore_index: target that does not count.
        classes: V of the sample batch.

    Example:
        >>> from trimtab.losses import stablemax_cross_entropy
        >>> class TestStablemax(LossTestCase):
        ...     loss = staticmethod(stablemax_cross_entropy)
        >>> TestStablemax().test_gradcheck()
    """

    loss: ClassVar[Callable[..., Tensor]]
    ignore_index: ClassVar[int] = -100
    classes: ClassVar[int] = 5

    def batch(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return logits [B, V] that need a gradient and targets [B], two of which are ignored."""
        generator = torch.Generator().manual_seed(0)
        logits_BV = 3 * torch.randn(8, self.classes, generator=generator, dtype=torch.float64)
        targets_B = torch.randint(self.classes, (8,), generator=generator)
        targets_B[[1, 6]] = self.ignore_index
        return logits_BV.to(dtype).requires_grad_(), targets_B

    def gradient(self, logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """Return the gradient of the loss in the logits."""
        leaf = logits.detach().clone().requires_grad_()
        self._loss(leaf, targets, **options).backward()
        if leaf.grad is None:
            raise AssertionError("the loss has no gradient in the logits")
        return leaf.grad

    def _loss(self, logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return type(self).loss(logits, targets, **options)

    def _count(self, targets: Tensor) -> int:
        return sum(target != self.ignore_index for target in targets.flatten().tolist())

    def test_gradcheck(self) -> None:
        logits, targets = self.batch()
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(lambda x, r=reduction: self._loss(x, targets, reduction=r), (logits,))

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_computed_in_float32_or_better(self, dtype: torch.dtype) -> None:
        logits, targets = self.batch(dtype)
        loss = self._loss(logits, targets)
        exact = self._loss(logits.detach().double(), targets)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
        assert self.gradient(logits, targets).dtype == dtype

    def test_deterministic_and_pure(self) -> None:
        logits, targets = self.batch(torch.float32)
        before = logits.detach().clone(), targets.clone(), torch.get_rng_state()
        first, second = self.gradient(logits, targets), self.gradient(logits, targets)
        assert torch.equal(first, second)
        assert torch.equal(logits.detach(), before[0])
        assert torch.equal(targets, before[1])
        assert torch.equal(torch.get_rng_state(), before[2]), "the loss draws random numbers"

    def test_reductions_agree(self) -> None:
        logits, targets = self.batch()
        each = self._loss(logits, targets, reduction="none")
        assert each.shape == targets.shape
        torch.testing.assert_close(self._loss(logits, targets, reduction="sum"), each.sum())
        torch.testing.assert_close(self._loss(logits, targets), each.sum() / self._count(targets))
        torch.testing.assert_close(self._loss(logits, targets, denominator=2.5), each.sum() / 2.5)
        torch.testing.assert_close(self._loss(logits, targets, denominator=torch.tensor(2.5)), each.sum() / 2.5)

    @pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 2, 5), (1,) * 8], ids=str)
    def test_micro_batches_add_up(self, sizes: tuple[int, ...]) -> None:
        logits, targets = self.batch()
        total = self._count(targets)
        whole = self.gradient(logits, targets)
        parts = [
            self.gradient(x, y, denominator=total)
            for x, y in zip(logits.split(sizes), targets.split(sizes), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts), whole)

    def test_ranks_add_up(self) -> None:
        logits, targets = self.batch()
        head = torch.linspace(-1, 1, self.classes * self.classes, dtype=torch.float64).view(self.classes, self.classes)

        def gradient(inputs: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
            weight = head.clone().requires_grad_()
            self._loss(inputs @ weight, targets, denominator=denominator).backward()
            return weight.grad if weight.grad is not None else torch.zeros_like(weight)

        def work(rank: int) -> Tensor:
            # Uneven halves, of which the ignored targets are uneven parts.
            mine = slice(0, 3) if rank == 0 else slice(3, None)
            count = torch.tensor(self._count(targets[mine]))
            dist.all_reduce(count)
            part = gradient(logits.detach()[mine], targets[mine], count)
            dist.all_reduce(part)
            return part

        whole = gradient(logits.detach(), targets, torch.tensor(self._count(targets)))
        for part in run_ranks(work):
            torch.testing.assert_close(part, whole)

    @pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
    def test_ignored_positions_do_not_count(self, value: float) -> None:
        logits, targets = self.batch()
        changed = logits.detach().clone()
        changed[targets == self.ignore_index] = value
        assert torch.equal(self._loss(changed, targets), self._loss(logits, targets))
        gradient = self.gradient(changed, targets)
        assert not gradient[targets == self.ignore_index].any()
        assert torch.equal(gradient, self.gradient(logits, targets))

    def test_nothing_that_counts(self) -> None:
        logits, targets = self.batch()
        ignored = torch.full_like(targets, self.ignore_index)
        for x, y in [(logits, ignored), (logits[:0], targets[:0])]:
            assert to_scalar(self._loss(x, y)) == 0
            assert not self.gradient(x, y).any()

    def test_masked_classes(self) -> None:
        logits, targets = self.batch()
        masked = logits.detach().clone()
        column = torch.arange(self.classes) == self.classes - 1
        masked[:, column] = -math.inf
        kept = targets.clamp(max=self.classes - 2)
        kept[targets == self.ignore_index] = self.ignore_index
        gradient = self.gradient(masked, kept)
        assert gradient.isfinite().all()
        assert not gradient[:, column].any()
        without = self._loss(masked[:, ~column], kept)
        torch.testing.assert_close(self._loss(masked, kept), without)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_diverged_logit_is_not_hidden(self, value: float) -> None:
        logits, targets = self.batch()
        diverged = logits.detach().clone()
        diverged[0, 0] = value
        assert not math.isfinite(to_scalar(self._loss(diverged, targets)))

    @pytest.mark.parametrize("size", [1e-30, 1e4, 1e30])
    def test_extreme_logits_have_finite_gradients(self, size: float) -> None:
        logits, targets = self.batch(torch.float32)
        assert self.gradient(logits.detach().sign() * size, targets).isfinite().all()

    def test_leading_dimensions(self) -> None:
        logits, targets = self.batch()
        grid = self._loss(logits.view(2, 4, -1), targets.view(2, 4))
        torch.testing.assert_close(grid, self._loss(logits, targets))
        each = self._loss(logits.view(2, 4, -1), targets.view(2, 4), reduction="none")
        torch.testing.assert_close(each.flatten(), self._loss(logits, targets, reduction="none"))

    def test_edge_shapes(self) -> None:
        logits, targets = self.batch()
        single = self._loss(logits[0], targets[0], reduction="none")
        torch.testing.assert_close(single, self._loss(logits, targets, reduction="none")[0])
        transposed = logits.detach().T.contiguous().T
        assert not transposed.is_contiguous()
        torch.testing.assert_close(self._loss(transposed, targets), self._loss(logits, targets))
        assert self._loss(logits[:, :1], torch.zeros_like(targets)).isfinite()

    def test_compiles(self) -> None:
        logits, targets = self.batch(torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(self._loss, backend="aot_eager", fullgraph=True)
        leaf = logits.detach().clone().requires_grad_()
        loss = compiled(leaf, targets)
        loss.backward()
        torch.testing.assert_close(loss, self._loss(logits, targets))
        torch.testing.assert_close(leaf.grad, self.gradient(logits, targets))

    def test_autocast_changes_nothing(self) -> None:
        logits, targets = self.batch(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self._loss(logits, targets)
        assert torch.equal(loss, self._loss(logits, targets))

    def test_loss_object_survives_deepcopy(self) -> None:
        logits, targets = self.batch()
        assert torch.equal(copy.deepcopy(type(self).loss)(logits, targets), self._loss(logits, targets))

    def test_wrong_arguments_are_named(self) -> None:
        logits, targets = self.batch()
        with pytest.raises(ValueError, match="reduction"):
            self._loss(logits, targets, reduction="average")
        with pytest.raises(ValueError, match="denominator"):
            self._loss(logits, targets, denominator=0)
        with pytest.raises(ValueError, match="denominator"):
            self._loss(logits, targets, reduction="sum", denominator=3)
        with pytest.raises(ValueError, match="shape"):
            self._loss(logits, targets[:-1])
        with pytest.raises(ValueError, match="indices"):
            self._loss(logits, targets.double())
        with pytest.raises(ValueError, match="floating point"):
            self._loss(targets.unsqueeze(-1), targets)
