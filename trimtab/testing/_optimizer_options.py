"""The part of the optimizer contract that is about options: ways of running, formats of state, bad gradients."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from trimtab.scalars import to_scalar
from trimtab.testing._trees import assert_same_tree, values_of

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}


class OptimizerOptions:
    """Base of `OptimizerTestCase`, which documents the attributes."""

    lr: ClassVar[float] = 0.01
    maximize: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    paths: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain": {"foreach": False},
        "foreach": {"foreach": True},
        "compiled": {"compile": True},
    }
    formats: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "8bit")
    policies: ClassVar[bool] = True

    def optimizer(self, params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer, with learning rate `lr` unless `options` has another."""
        raise NotImplementedError("give `optimizer`: it returns the optimizer to test")

    def _model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)

    def _backward(self, model: nn.Module, step: int, sign: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(step % 4)
        dtype = next(model.parameters()).dtype
        x = torch.randn(16, 6, generator=generator).to(dtype)
        model.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        (sign * loss).backward()
        return loss.detach()

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, sign: float = 1.0
    ) -> list[float]:
        losses = []
        for step in steps:
            losses.append(to_scalar(self._backward(model, step, sign)))
            optimizer.step()
        return losses

    def _wide(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 800), nn.Tanh(), nn.Linear(800, 4)).to(dtype)

    def _along(self, options: Mapping[str, Any], dtype: torch.dtype, steps: int = 6) -> list[Tensor]:
        model = self._model(dtype)
        self._train(model, self.optimizer(model.parameters(), **options), range(steps))
        return values_of(model)

    # torch.compile's first use of MKL-DNN imports a module with deprecated calls.
    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("dtype", list(_TOLERANCE), ids=str)
    def test_ways_of_running_agree(self, dtype: torch.dtype) -> None:
        if not self.paths:
            pytest.skip("the optimizer has one way of running")
        reference, *others = self.paths.values()
        expected = self._along(reference, dtype)
        assert any((x != y).any() for x, y in zip(expected, values_of(self._model(dtype)), strict=True))
        # Compiling takes seconds: in the other dtypes the same code is compiled when all is asked for.
        everything = dtype == torch.float32 or bool(os.environ.get("TRIMTAB_COMPILE_ALL"))
        for options in others:
            if options.get("compile") and not everything:
                continue
            for x, y in zip(self._along(options, dtype), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype])

    @pytest.mark.parametrize("form", ["fp32", "bf16", "8bit"])
    def test_state_formats_train_and_resume_bit_exactly(self, form: str) -> None:
        if form not in self.formats:
            pytest.skip(f"the optimizer keeps no {form} state")
        model = self._wide()
        optimizer = self.optimizer(model.parameters(), state=form)
        losses = self._train(model, optimizer, range(16))
        assert sum(losses[-4:]) < sum(losses[:4])
        stream = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)
        other = self._wide()
        other.load_state_dict(saved["model"])
        resumed = self.optimizer(other.parameters(), state=form)
        resumed.load_state_dict(saved["optimizer"])
        assert_same_tree(resumed.state_dict(), optimizer.state_dict())
        self._train(model, optimizer, range(16, 20))
        self._train(other, resumed, range(16, 20))
        assert_same_tree(dict(other.state_dict()), dict(model.state_dict()))

    def test_fewer_bits_keep_fewer_bytes(self) -> None:
        if not {"bf16", "8bit"} & set(self.formats):
            pytest.skip("the optimizer keeps its state in one format")
        sizes = {}
        for form in self.formats:
            model = self._wide()
            optimizer = self.optimizer(model.parameters(), state=form)
            self._train(model, optimizer, range(1))
            sizes[form] = sum(
                value.numel() * value.element_size()
                for state in optimizer.state_dict()["state"].values()
                for value in state.values()
                if isinstance(value, Tensor)
            )
        assert all(sizes[form] < sizes["fp32"] for form in self.formats if form != "fp32"), sizes

    def test_accumulated_gradients_are_one_gradient(self) -> None:
        whole, parts = self._model(), self._model()
        one, two = self.optimizer(whole.parameters()), self.optimizer(parts.parameters())
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            for model, pieces in ((whole, [x]), (parts, list(x.split(4)))):
                model.zero_grad()
                for piece in pieces:
                    ((model(piece) - piece[:, :4]).square().mean() * (len(piece) / 16)).backward()
            one.step()
            two.step()
        for a, b in zip(values_of(whole), values_of(parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_learning_rate_may_be_a_tensor(self) -> None:
        model, other = self._model(), self._model()
        self._train(model, self.optimizer(model.parameters(), lr=torch.tensor(self.lr, dtype=torch.float64)), range(4))
        self._train(other, self.optimizer(other.parameters(), lr=self.lr), range(4))
        for a, b in zip(values_of(model), values_of(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_refuses_sparse_and_complex_by_name(self) -> None:
        p = nn.Parameter(torch.ones(4, 3))
        optimizer = self.optimizer([p])
        p.grad = torch.eye(4)[:, :3].to_sparse()
        if self.policies:
            with pytest.raises((ValueError, RuntimeError), match="sparse"):
                optimizer.step()
            with pytest.raises((ValueError, TypeError, RuntimeError), match="complex"):
                self.optimizer([nn.Parameter(torch.ones(3, dtype=torch.complex64))])

    @pytest.mark.parametrize("policy", ["raise", "skip"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_gradients_change_nothing(self, policy: str, value: float) -> None:
        if not self.policies:
            pytest.skip("the optimizer has no option nonfinite")
        model = self._model()
        optimizer = self.optimizer(model.parameters(), nonfinite=policy)
        self._train(model, optimizer, range(2))
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        stream.seek(0)
        saved, before = torch.load(stream, weights_only=True), values_of(model)
        self._backward(model, 2)
        list(model.parameters())[2].grad[0, 0] = value  # type: ignore[index]
        if policy == "raise":
            with pytest.raises(RuntimeError, match="NaN or infinite"):
                optimizer.step()
        else:
            optimizer.step()
        assert_same_tree(optimizer.state_dict(), saved)
        assert all(torch.equal(x, y) for x, y in zip(before, values_of(model), strict=True))
        self._train(model, optimizer, range(3, 5))
        assert all(p.isfinite().all() and (p != old).any() for p, old in zip(model.parameters(), before, strict=True))
