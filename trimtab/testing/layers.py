"""LayerTestCase: what every layer, and every model that a method changed, must hold."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trimtab.testing.ranks import run_ranks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_STEPS = 3
_LR = 0.1


class LayerTestCase:
    """Contract of a layer or changed model; the first dimension of inputs and output is that of the samples.

    Subclass it, give `layer` and `inputs`, and pytest collects every test below.

    Attributes:
        unused: names of parameters that get no gradient.
        bfloat16_tolerance: largest difference of the output in bfloat16 from that in float64, relative to its largest
            value.

    Example:
        >>> class TestMyLayer(LayerTestCase):
        ...     def layer(self) -> nn.Module:
        ...         return nn.Linear(4, 3)
        ...
        ...     def inputs(self, samples: int) -> tuple[Tensor, ...]:
        ...         return (torch.linspace(-1, 1, samples * 4).view(samples, 4),)
        >>> TestMyLayer().test_gradcheck()
    """

    unused: ClassVar[tuple[str, ...]] = ()
    bfloat16_tolerance: ClassVar[float] = 0.05

    def layer(self) -> nn.Module:
        """Return a new float32 layer; torch's global generator is seeded before each call."""
        raise NotImplementedError("give `layer`: it returns the module to test")

    def inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return the same float32 inputs each time; the first dimension of each is `samples`."""
        raise NotImplementedError("give `inputs`: it returns the arguments of the module's forward")

    def _layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.layer().to(dtype)

    def _inputs(self, samples: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs(samples))

    def test_gradcheck(self) -> None:
        layer = self._layer(torch.float64).eval()
        names = [name for name, _ in layer.named_parameters()]
        inputs = self._inputs(2, torch.float64)
        leaves = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)

        def call(*tensors: Tensor) -> Tensor:
            parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
            return torch.func.functional_call(layer, parameters, tensors[: len(inputs)])

        values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
        assert torch.autograd.gradcheck(call, (*leaves, *values), fast_mode=True)

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        layer = self._layer(dtype)
        output = layer(*self._inputs(dtype=dtype))
        output.float().square().mean().backward()
        assert output.dtype == dtype
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        exact = self._layer(torch.float64)(*self._inputs(dtype=torch.float64))
        bound = self.bfloat16_tolerance if dtype == torch.bfloat16 else 1e-5
        assert (output.double() - exact).abs().max() <= bound * exact.abs().max()

    def test_every_parameter_gets_a_gradient(self) -> None:
        layer = self._layer()
        _loss(layer(*self._inputs())).backward()
        without = {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()}
        assert without == set(self.unused)

    def test_deterministic(self) -> None:
        first, second = self._layer(), self._layer()
        for _ in range(2):
            assert torch.equal(first(*self._inputs()), second(*self._inputs()))

    def test_evaluation_changes_nothing(self) -> None:
        layer = self._layer().eval()
        before = copy.deepcopy(layer.state_dict())
        first, second = layer(*self._inputs()), layer(*self._inputs())
        assert torch.equal(first, second)
        _assert_same_state(layer.state_dict(), before)

    def test_samples_do_not_mix(self) -> None:
        layer, inputs = self._layer().eval(), self._inputs(4)
        whole = layer(*inputs)
        each = torch.cat([layer(*(x[i : i + 1] for x in inputs)) for i in range(4)])
        torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("samples", [0, 1])
    def test_edge_shapes(self, samples: int) -> None:
        layer = self._layer()
        output = layer(*(x[:samples] for x in self._inputs()))
        assert output.shape[0] == samples
        output.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

    def test_state_dict_round_trip(self) -> None:
        layer = self._layer()
        _train(layer, self._inputs())
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        other = self._layer()
        other.load_state_dict(torch.load(stream, weights_only=True))
        _assert_same_state(other.state_dict(), layer.state_dict())
        _train(layer, self._inputs())
        _train(other, self._inputs())
        _assert_same_state(other.state_dict(), layer.state_dict())

    def test_deepcopy_is_independent(self) -> None:
        layer = self._layer()
        layer(*self._inputs())
        other, before = copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
        _assert_same_state(other.state_dict(), before)
        _train(other, self._inputs())
        _assert_same_state(layer.state_dict(), before)
        _train(layer, self._inputs())
        _assert_same_state(other.state_dict(), layer.state_dict())

    def test_compiles(self) -> None:
        eager, compiled = self._layer(), self._layer()
        torch._dynamo.reset()
        call = torch.compile(compiled, backend="aot_eager")
        _train(eager, self._inputs())
        _train(compiled, self._inputs(), call)
        _assert_close_state(compiled.state_dict(), eager.state_dict())

    def test_autocast(self) -> None:
        layer, inputs = self._layer(), self._inputs()
        exact = self._layer()(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(*inputs)
        _loss(output.float()).backward()
        assert (output.float() - exact).abs().max() <= self.bfloat16_tolerance * exact.abs().max()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in layer.parameters())

    def test_two_forwards_before_the_backward(self) -> None:
        layer, inputs = self._layer(), self._inputs()
        (_loss(layer(*inputs)) + _loss(layer(*inputs))).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

    def test_activation_checkpointing(self) -> None:
        plain, checkpointed, inputs = self._layer(), self._layer(), self._inputs()
        _train(plain, inputs)
        _train(checkpointed, inputs, lambda *x: checkpoint(checkpointed, *x, use_reentrant=False))
        _assert_close_state(checkpointed.state_dict(), plain.state_dict())

    def test_data_parallel(self) -> None:
        def work(rank: int) -> dict[str, Tensor]:
            layer = self._layer()
            wrapped = DistributedDataParallel(layer, find_unused_parameters=bool(self.unused))
            _train(layer, tuple(x[2 * rank : 2 * rank + 2] for x in self._inputs(4)), wrapped)
            return dict(layer.state_dict())

        alone = self._layer()
        _train(alone, self._inputs(4))
        for state in run_ranks(work):
            _assert_close_state(state, alone.state_dict())

    def test_fully_sharded(self) -> None:
        def work(rank: int) -> dict[str, Tensor]:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            layer = nn.Sequential(self._layer())
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(layer[0], mesh=mesh)
            fully_shard(layer, mesh=mesh)
            with warnings.catch_warnings():
                # It would matter if the output were changed in place.
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
                _train(layer, tuple(x[2 * rank : 2 * rank + 2] for x in self._inputs(4)))
            return {
                name.removeprefix("0."): value.full_tensor() if hasattr(value, "full_tensor") else value
                for name, value in layer.state_dict().items()
            }

        alone = self._layer()
        _train(alone, self._inputs(4))
        for state in run_ranks(work):
            _assert_close_state(state, alone.state_dict())


def _loss(output: Tensor) -> Tensor:
    """Return a mean over samples, so that the mean of the ranks' gradients is that of the whole batch."""
    target = torch.linspace(-1, 1, output[:1].numel()).view_as(output[:1]).to(output)
    return (output - target).square().flatten(1).sum(dim=1).mean()


def _train(layer: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Tensor] | None = None) -> None:
    """Take a few steps of gradient descent, of a length that does not grow with the gradient."""
    forward = layer if call is None else call
    optimizer = torch.optim.SGD(layer.parameters(), lr=_LR)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        (_loss(forward(*inputs)) / 100).backward()
        optimizer.step()


def _assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def _assert_close_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        difference = (value.double() - right[name].double()).abs()
        assert (difference <= 1e-5 + 1e-4 * right[name].double().abs()).all(), name
