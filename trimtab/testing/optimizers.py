"""OptimizerTestCase: the contract of torch.optim, as users and checkpoints rely on it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from trimtab.scalars import to_scalar
from trimtab.testing._optimizer_options import OptimizerOptions
from trimtab.testing._trees import assert_same_tree, values_of
from trimtab.testing.ranks import run_ranks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class OptimizerTestCase(OptimizerOptions):
    """Contract of an optimizer. Subclass it, give `optimizer`, and pytest collects every test below.

    Attributes:
        lr: a learning rate at which 30 steps lower a small regression's loss.
        maximize: whether the optimizer has the option `maximize`.
        elementwise: whether parameters do not influence each other, nor entries of one parameter (false for methods
            that look at norms or matrices); sharding is compared with a tolerance where it is false.
        paths: ways of running that must agree, by name, each as options of the optimizer; {} if it has one only.
        formats: values of the option `state`, each of which must train and resume; () if it has no such option.
        policies: whether it has the option `nonfinite` with "raise" and "skip".

    Example:
        >>> class TestSGD(OptimizerTestCase):
        ...     paths, formats, policies = {}, (), False
        ...
        ...     def optimizer(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        ...         return torch.optim.SGD(params, **{"lr": self.lr, "momentum": 0.9, **options})
        >>> TestSGD().test_leaves_gradients_alone()
    """

    def test_lowers_the_loss(self) -> None:
        model = self._model()
        losses = self._train(model, self.optimizer(model.parameters()), range(32))
        assert sum(losses[-4:]) < sum(losses[:4])

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_resumes_bit_exactly_through_disk(self, dtype: torch.dtype) -> None:
        model = self._model(dtype)
        optimizer = self.optimizer(model.parameters())
        self._train(model, optimizer, range(5))
        stream = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)

        other = self._model(dtype)
        other.load_state_dict(saved["model"])
        resumed = self.optimizer(other.parameters())
        resumed.load_state_dict(saved["optimizer"])
        assert_same_tree(resumed.state_dict(), optimizer.state_dict())
        self._train(model, optimizer, range(5, 10))
        self._train(other, resumed, range(5, 10))
        assert_same_tree(dict(other.state_dict()), dict(model.state_dict()))
        assert_same_tree(resumed.state_dict(), optimizer.state_dict())

    def test_state_dict_is_a_plain_tree(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        assert optimizer.state_dict()["state"] == {}, "state before the first step"
        self._train(model, optimizer, range(2))
        state = optimizer.state_dict()
        assert set(state) == {"state", "param_groups"}
        assert state["param_groups"][0]["params"] == list(range(len(list(model.parameters()))))

    def test_deepcopy_goes_on_alike(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        self._train(model, optimizer, range(3))
        # Together, so that the copied optimizer refers to the copied parameters.
        other, twin = copy.deepcopy((model, optimizer))
        self._train(model, optimizer, range(3, 6))
        self._train(other, twin, range(3, 6))
        assert_same_tree(dict(other.state_dict()), dict(model.state_dict()))

    def test_schedulers_set_the_learning_rate(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
        before = values_of(model)
        for step in range(2):
            self._backward(model, step)
            optimizer.step()
            scheduler.step()
        moved = values_of(model)
        assert all((x != y).any() for x, y in zip(before, moved, strict=True))
        self._train(model, optimizer, range(2, 4))
        assert all(torch.equal(x, y) for x, y in zip(moved, values_of(model), strict=True)), "lr 0 moved parameters"

    def test_groups_have_their_own_options(self) -> None:
        model = self._model()
        first, last = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index]
        optimizer = self.optimizer([{"params": first, "lr": 0.0}, {"params": last}])
        before = values_of(model)
        self._train(model, optimizer, range(2))
        after = values_of(model)
        assert all(torch.equal(x, y) for x, y in zip(before[:2], after[:2], strict=True))
        assert all((x != y).any() for x, y in zip(before[2:], after[2:], strict=True))

    def test_equal_groups_are_one_group(self) -> None:
        one, two = self._model(), self._model()
        first, last = two[0], two[2]  # type: ignore[index]
        self._train(one, self.optimizer(one.parameters()), range(4))
        groups = self.optimizer([{"params": list(first.parameters())}])
        groups.add_param_group({"params": list(last.parameters())})
        self._train(two, groups, range(4))
        for x, y in zip(values_of(one), values_of(two), strict=True):
            torch.testing.assert_close(x, y)

    def test_closures(self) -> None:
        model, other = self._model(), self._model()
        optimizer, twin = self.optimizer(model.parameters()), self.optimizer(other.parameters())

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            return self._backward(model, 0)

        with torch.no_grad():
            # torch's stub asks for a closure of floats; its documentation has one of tensors.
            loss = optimizer.step(closure)  # type: ignore[arg-type]
        expected = self._backward(other, 0)
        assert twin.step() is None
        assert loss is not None
        assert to_scalar(loss) == to_scalar(expected)
        assert_same_tree(dict(model.state_dict()), dict(other.state_dict()))

    def test_maximize_descends_the_negative(self) -> None:
        if not self.maximize:
            pytest.skip("the optimizer has no option maximize")
        up, down = self._model(), self._model()
        self._train(up, self.optimizer(up.parameters(), maximize=True), range(4), sign=-1.0)
        self._train(down, self.optimizer(down.parameters()), range(4))
        for x, y in zip(values_of(up), values_of(down), strict=True):
            torch.testing.assert_close(x, y)

    def test_leaves_gradients_alone(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        for step in range(3):
            self._backward(model, step)
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            after = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    def test_missing_gradients_leave_parameters_alone(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        for step in range(3):
            self._backward(model, step)
            frozen = model[0].weight  # type: ignore[index]
            frozen.grad = None
            before = frozen.detach().clone()
            optimizer.step()
            assert torch.equal(frozen, before)
        model.zero_grad()
        before_all = values_of(model)
        optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(before_all, values_of(model), strict=True))

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_zero_gradients_stay_finite(self, dtype: torch.dtype) -> None:
        model = self._model(dtype)
        optimizer = self.optimizer(model.parameters())
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        self._train(model, optimizer, range(2))
        assert all(p.isfinite().all() for p in model.parameters())

    def test_odd_shapes(self) -> None:
        shapes = [(), (0,), (1,), (3, 0), (1, 5), (5, 1), (2, 3, 4), (2, 2, 1, 3, 1)]
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        params.append(nn.Parameter(torch.ones(4, 3).T))
        optimizer = self.optimizer(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        for p in params:
            assert p.isfinite().all()
            assert (p < 1).all(), f"shape {tuple(p.shape)} did not move"

    def test_step_hooks_run(self) -> None:
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        self._train(model, optimizer, range(2))
        assert calls == ["before", "after"] * 2

    def test_draws_no_global_random_numbers(self) -> None:
        model = self._model()
        before = torch.get_rng_state()
        optimizer = self.optimizer(model.parameters())
        self._train(model, optimizer, range(2))
        assert torch.equal(torch.get_rng_state(), before)

    def test_wrong_values_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"lr|learning rate"):
            self.optimizer(self._model().parameters(), lr=-1.0)
        with pytest.raises(ValueError, match="empty"):
            self.optimizer([])

    def test_sharded_parameters(self) -> None:
        def work(rank: int) -> list[Tensor]:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            model = self._model(torch.float64)
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            self._train(model, self.optimizer(model.parameters()), range(4))
            return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]

        alone = self._model(torch.float64)
        self._train(alone, self.optimizer(alone.parameters()), range(4))
        bound = 1e-10 if self.elementwise else 1e-4
        for values in run_ranks(work):
            for x, y in zip(values, values_of(alone), strict=True):
                torch.testing.assert_close(x, y, rtol=bound, atol=bound)
