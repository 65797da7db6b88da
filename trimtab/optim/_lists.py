"""A list of tensors that computes like one tensor, so that an update rule is written once for one and for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_OPERATIONS = (
    *("add", "sub", "mul", "div", "pow", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "clamp_min", "clamp_max"),
    *("abs", "neg", "sign", "sqrt", "rsqrt", "reciprocal", "exp", "log", "erf", "tanh", "sigmoid", "round", "zero"),
)
"""Operations that torch runs on a whole list at once, most with a variant in place."""


def _table() -> dict[Any, Callable[..., Any]]:
    """Map torch's functions and Tensor's methods, in place or not, to those on lists, as far as this torch has them."""
    table: dict[Any, Callable[..., Any]] = {}
    for name in _OPERATIONS:
        for variant in (name, name + "_"):
            on_lists = getattr(torch, f"_foreach_{variant}", None)
            for home in (torch, Tensor):
                on_one = getattr(home, variant, None)
                if on_lists is not None and on_one is not None:
                    table[on_one] = on_lists
    return table


_ON_LISTS = _table()


class TensorList:
    """Tensors of one dtype and device under one name; every operation of torch applies to each of them.

    Arithmetic, and what else torch can run on lists, is one call for all; anything else is a call for each. Attributes
    that are not tensors (shape, dtype) are those of the first tensor: lists whose shapes differ must not read them.

    Example:
        >>> x = TensorList([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
        >>> (x * 2 + 1).tensors
        [tensor([7., 9.]), tensor([3.])]
        >>> torch.linalg.vector_norm(x).tensors
        [tensor(5.), tensor(1.)]
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        values = [getattr(tensor, name) for tensor in self.tensors[:1]]
        if not values:
            raise AttributeError(name)
        if callable(values[0]):
            method = getattr(Tensor, name)
            return lambda *args, **kwargs: _call(method, (self, *args), kwargs)
        if isinstance(values[0], Tensor):
            return TensorList([getattr(tensor, name) for tensor in self.tensors])
        return values[0]

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        return _call(Tensor.__getitem__, (self, index), {})

    def __add__(self, other: Any) -> Any:
        return _call(Tensor.add, (self, other), {})

    def __radd__(self, other: Any) -> Any:
        return _call(Tensor.add, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return _call(Tensor.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return _call(Tensor.add, (_call(Tensor.neg, (self,), {}), other), {})

    def __mul__(self, other: Any) -> Any:
        return _call(Tensor.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Any:
        return _call(Tensor.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return _call(Tensor.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Any:
        return _call(Tensor.mul, (_call(Tensor.reciprocal, (self,), {}), other), {})

    def __pow__(self, other: Any) -> Any:
        return _call(Tensor.pow, (self, other), {})

    def __matmul__(self, other: Any) -> Any:
        return _call(torch.matmul, (self, other), {})

    def __neg__(self) -> Any:
        return _call(Tensor.neg, (self,), {})

    def __lt__(self, other: Any) -> Any:
        return _call(Tensor.lt, (self, other), {})

    def __le__(self, other: Any) -> Any:
        return _call(Tensor.le, (self, other), {})

    def __gt__(self, other: Any) -> Any:
        return _call(Tensor.gt, (self, other), {})

    def __ge__(self, other: Any) -> Any:
        return _call(Tensor.ge, (self, other), {})


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    on_lists = _ON_LISTS.get(func)
    if on_lists is not None and _fits(args, kwargs):
        result = on_lists(*(_unwrap(arg) for arg in args), **kwargs)
        # Operations in place return None or the list they were given.
        return args[0] if func.__name__.endswith("_") else TensorList(result)
    count = next(len(arg) for arg in _leaves(args, kwargs) if isinstance(arg, TensorList))
    results = [
        func(*(_pick(arg, index) for arg in args), **{name: _pick(arg, index) for name, arg in kwargs.items()})
        for index in range(count)
    ]
    if isinstance(results[0], tuple):
        return tuple(TensorList(part) for part in zip(*results, strict=True))
    if results[0] is None:
        return None
    return TensorList(results)


def _fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch's function on lists takes these arguments: a list first, then lists and numbers."""
    if not isinstance(args[0], TensorList) or not args[0].tensors or kwargs.keys() - {"value", "alpha"}:
        return False
    if kwargs.keys() and any(isinstance(arg, (int, float)) for arg in args):
        return False
    return all(isinstance(arg, (TensorList, int, float)) for arg in args)


def _unwrap(arg: Any) -> Any:
    return arg.tensors if isinstance(arg, TensorList) else arg


def _pick(arg: Any, index: int) -> Any:
    if isinstance(arg, TensorList):
        return arg.tensors[index]
    if isinstance(arg, (list, tuple)):
        return type(arg)(_pick(part, index) for part in arg)
    return arg


def _leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for arg in (*args, *kwargs.values()):
        found += arg if isinstance(arg, (list, tuple)) else [arg]
    return found
