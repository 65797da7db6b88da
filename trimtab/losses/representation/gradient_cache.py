"""GradCache: the gradient of a contrastive loss of the whole batch, in the memory of a micro-batch.

    1. z = [f(x_1), ..., f(x_m)] without a graph     2. u = dL(z) / dz
    3. for each micro-batch j: backward of <u_j, f(x_j)>, with the random numbers of step 1

A contrastive loss couples all samples of a batch, so that the losses of micro-batches do not add up to it: accumulating
their gradients gives fewer negatives instead. But the loss reaches the encoder through embeddings alone, so that with
their gradients cached each micro-batch is encoded again and differentiated alone, for one more forward pass.

Gao et al. 2021 (arXiv:2101.06983); authors' code luyug/GradCache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError

__all__ = ["cached_contrastive_step"]

Batch = Tensor | Sequence[Any] | Mapping[str, Any]


def cached_contrastive_step(
    encoders: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    batches: Sequence[Batch],
    loss: Callable[..., Tensor],
    *,
    micro_batch: int = 32,
) -> Tensor:
    """Add the gradient of a loss of the whole batch to the parameters' `.grad`, one micro-batch at a time.

    It replaces `loss(*[encode(batch) for ...]).backward()`. With dropout, it is what that would give had the micro-
    batches been encoded one after another: their random numbers are drawn once and played back. Buffers such as the
    running statistics of batch normalisation move once too, though its statistics are those of micro-batches.

    On several ranks, give the loss gathered negatives (`all_ranks=True`); encoders wrapped in DistributedDataParallel
    average their gradients once, at the end. For a `GradScaler`, let `loss` return the scaled loss.

    Args:
        encoders: one for all inputs, or one for each; each takes a micro-batch and returns embeddings, a tensor whose
            first dimension is that of the batch.
        batches: what the encoders encode, such as (anchors, positives): each a tensor, a mapping of keyword arguments
            or a sequence of arguments; tensors are split along their first dimension, anything else is passed on.
        loss: of all embeddings, in the order of `batches`; its own parameters get their gradients too.
        micro_batch: most samples that are encoded at once, above 0.

    Returns:
        The loss, detached.

    Raises:
        UsageError: if an argument breaks its rule, or an encoder does not return a row of one tensor for each sample.

    Example:
        >>> from trimtab.losses import multiple_negatives_ranking_loss
        >>> encoder, x = nn.Linear(4, 3), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> loss = cached_contrastive_step(encoder, (x, x + 0.1), multiple_negatives_ranking_loss, micro_batch=2)
        >>> encoder.weight.grad.shape
        torch.Size([3, 4])

    References:
        Gao et al. 2021, arXiv:2101.06983.
    """
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or micro_batch < 1:
        raise UsageError(f"micro_batch must be a whole number above 0, got {micro_batch!r}.")
    if isinstance(batches, Tensor):
        raise UsageError("batches must be one for each side, such as (anchors, positives), got a single tensor.")
    each = list(encoders) if isinstance(encoders, Sequence) else [encoders] * len(batches)
    if not batches or len(each) != len(batches):
        raise UsageError(f"each batch needs an encoder, got {len(each)} encoders and {len(batches)} batches.")
    parts = [_split(batch, micro_batch) for batch in batches]
    modules = list({id(encode): encode for encode in each if isinstance(encode, nn.Module)}.values())
    devices = _devices(modules, batches)
    buffers = [buffer for module in modules for buffer in module.buffers()]
    kept = [buffer.detach().clone() for buffer in buffers]

    states: list[list[_RandomState]] = []
    embeddings: list[Tensor] = []
    with torch.no_grad():
        for encode, chunks in zip(each, parts, strict=True):
            states.append([])
            rows = []
            for size, arguments, named in chunks:
                states[-1].append(_RandomState(devices))
                rows.append(_rows(encode(*arguments, **named), size))
            embeddings.append(torch.cat(rows))
    # In older torch, autocast keeps the casts of weights made without a graph and would use them in the second pass.
    torch.clear_autocast_cache()
    leaves = [embedding.detach().requires_grad_() for embedding in embeddings]
    with torch.enable_grad():
        value = loss(*leaves)
        value.backward()

    # The second pass moves buffers from where they were to where the first one left them.
    with torch.no_grad():
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
    last = {id(encode): index for index, encode in enumerate(each)}
    after = _RandomState(devices)
    try:
        for index, (encode, chunks, leaf) in enumerate(zip(each, parts, leaves, strict=True)):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            cached = gradient.split([size for size, _, _ in chunks])
            for j, (size, arguments, named) in enumerate(chunks):
                final = last[id(encode)] == index and j == len(chunks) - 1
                states[index][j].restore()
                with _synchronized(encode, final), torch.enable_grad():
                    rows_j = _rows(encode(*arguments, **named), size)
                    if rows_j.requires_grad:  # not of an encoder that is frozen
                        torch.autograd.backward(rows_j, cached[j])
    finally:
        after.restore()
    return value.detach()


class _RandomState:
    """The states of the generators that an encoder draws from: torch's own of the CPU and of the devices in use."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)


def _devices(modules: list[nn.Module], batches: Sequence[Batch]) -> list[torch.device]:
    tensors = [tensor for batch in batches for tensor in _tensors(batch)]
    tensors += [parameter for module in modules for parameter in module.parameters()]
    found = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    return sorted(found, key=str)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    values = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    yield from (value for value in values if isinstance(value, Tensor))


def _split(batch: Batch, size: int) -> list[tuple[int, tuple[Any, ...], dict[str, Any]]]:
    """Return micro-batches: number of samples, positional and keyword arguments of the encoder."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(batch)}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(f"the tensors of a batch must have one first dimension above 0, got {sorted(sizes)}.")
    total = sizes.pop()
    found = []
    for start in range(0, total, size):
        stop = min(start + size, total)

        def part(value: Any, window: slice = slice(start, stop)) -> Any:
            return value[window] if isinstance(value, Tensor) else value

        if isinstance(batch, Mapping):
            found.append((stop - start, (), {name: part(value) for name, value in batch.items()}))
        else:
            values = (batch,) if isinstance(batch, Tensor) else batch
            found.append((stop - start, tuple(part(value) for value in values), {}))
    return found


def _rows(output: Any, size: int) -> Tensor:
    if not isinstance(output, Tensor) or not output.dim() or output.shape[0] != size:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"an encoder must return embeddings, a tensor with {size} rows for {size} samples, got {kind}."
        )
    return output


@contextmanager
def _synchronized(encode: Callable[..., Tensor], now: bool) -> Iterator[None]:
    """Let DistributedDataParallel average gradients in the last backward pass only."""
    pause: Callable[[], AbstractContextManager[Any]] | None = getattr(encode, "no_sync", None)
    with nullcontext() if now or pause is None else pause():
        yield


CARD = Card(
    name="gradient-cache",
    room="losses",
    summary="the whole batch's contrastive gradient from micro-batches, by caching the gradients of embeddings",
    paper=Paper(
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        2021,
        arxiv="2101.06983",
        code="https://github.com/luyug/GradCache",
    ),
    equation="z = f(x) without a graph; u = dL/dz; dL/dtheta = sum_j d<u_j, f_theta(x_j)>/dtheta over micro-batches j",
    claim="Gives the gradient of any batch size in constant memory: one GPU reproduces a large-batch retriever.",
    acts_on="run",
    entry="trimtab.losses.representation.gradient_cache:cached_contrastive_step",
    defaults=(Default("micro_batch", 32, "ours"),),
    verified={
        "equation": (
            "tests/losses/representation/test_gradient_cache.py::test_equals_the_whole_batch",
            "tests/losses/representation/test_gradient_cache.py::test_dropout_is_played_back",
            "tests/losses/representation/test_gradient_cache.py::test_buffers_move_once",
            "tests/losses/representation/test_gradient_cache.py::"
            "test_ranks_with_gathered_negatives_equal_the_single_process",
        ),
    },
    deviations=(
        "Gradients of embeddings go straight into the second backward pass, where the authors differentiate a dot "
        "product in float32.",
        "Buffers are put back before the second pass, so that running statistics move once; in the authors' code they "
        "move twice.",
        "The matrix of scores of the whole batch is still held at once.",
        "Over ranks, gathered negatives carry gradients to the ranks they come from, for gradients that are averaged; "
        "the authors' gathering keeps this rank's alone, which averaging then divides by the number of ranks.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.contrastive:halves",
            "group=8,lr=0.003",
            "group=8,lr=0.001,cached=true",
            metric="recall",
            higher_is_better=True,
            mechanism="negatives",
            outcome=(
                "no evidence: 0.142 to 0.152, difference 0.00933 (95 % interval -0.00492 to 0.0236), n=5; "
                "negatives 7 to 63"
            ),
        ),
    ),
)
