"""Watch: attaches probes to a model and an optimizer, owns every hook, never changes the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from trimtab.errors import UsageError
from trimtab.record.writer import Recorder
from trimtab.scalars import to_floats
from trimtab.watch import nonfinite
from trimtab.watch.guarded import Probes, harmless
from trimtab.watch.norms import l2_norms
from trimtab.watch.patches import listen
from trimtab.watch.probe import Probe, Reading
from trimtab.watch.sampling import ForwardSample
from trimtab.watch.subject import as_optimizers, describe, is_compiled, make_scene, rank_of_process, world_size


class Watch:
    """Record what happens inside a training run, without changing it.

    Weights after a watched run are bit-equal to those of the unwatched run. Cheap signals (loss, learning rate,
    gradient norms) are recorded at every step, the others at every `every`-th step. A model compiled by
    `torch.compile` gives the signals that need no look inside its forward pass.

    Args:
        model: the model that is trained.
        optimizer: its optimizer, or several; None if the loop updates the weights itself (no update signals then).
        to: the run's folder; the record is `rank{N}.sqlite` in it.
        every: steps between the sampled steps.
        probes: probes to use instead of the built-in ones (`trimtab.watch.probes.default_probes`).
        resume: continue the record in `to` instead of refusing a folder that has one.
        rank: this process's rank; torch.distributed's if it is initialised, else 0.
        recorder: write to this recorder instead of opening one in `to`; it is left open.
        first_step: number of the first step; a resumed run goes on where its checkpoint was written.

    Raises:
        UsageError: for an argument that breaks a rule.
        RecordError: if the folder cannot be written or already holds a run.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Watch(model, optimizer, to=tempfile.mkdtemp()) as watch:
        ...     for _ in range(3):
        ...         loss = nn.functional.cross_entropy(model(torch.ones(8, 4)), torch.zeros(8, dtype=torch.long))
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         watch.step(loss)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        to: str | Path | None = None,
        every: int = 10,
        probes: Iterable[Probe] | None = None,
        resume: bool = False,
        rank: int | None = None,
        recorder: Recorder | None = None,
        first_step: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"Watch needs a torch.nn.Module, got {type(model).__name__}.")
        if every < 1:
            raise UsageError(f"every must be at least 1 step, got {every}.")
        if (to is None) == (recorder is None):
            raise UsageError("Watch needs a folder to write to: pass to=FOLDER (or a recorder, but not both).")
        self._model = model
        self._optimizers = as_optimizers(optimizer)
        self._every = every
        self._to, self._resume, self._rank = to, resume, rank_of_process() if rank is None else rank
        self._given_probes = None if probes is None else list(probes)
        self._given_recorder = recorder
        self._recorder: Recorder | None = recorder
        self._handles: list[RemovableHandle | Callable[[], None]] = []
        self._sample: ForwardSample | None = None
        self._step = first_step
        self._compiled = is_compiled(model)
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._origin: nonfinite.Origin | None = None
        self._episode = False
        self._located = 0
        self.failed: set[str] = set()
        self._ranks = world_size()
        self._forget_step()

    def _forget_step(self) -> None:
        """Clear what is remembered within one step."""
        self._seen_forward = False
        self._updating = False
        self._norms: list[float] | None = None
        self._extra: list[tuple[str, tuple[str, ...], list[float]]] = []
        self._inputs = ((), {})

    @property
    def recorder(self) -> Recorder:
        """The recorder that this watch writes to.

        Raises:
            UsageError: before the watch has started.
        """
        if self._recorder is None:
            raise UsageError("the watch has not started: use `with trimtab.Watch(...) as watch`, or watch.start().")
        return self._recorder

    @property
    def sampled(self) -> bool:
        """Whether the current step is one at which all probes look."""
        return self._step % self._every == 0

    def start(self) -> Watch:
        """Open the record and attach the hooks. Called by `with`."""
        if self._handles:
            raise UsageError("this watch has already started.")
        if self._recorder is None:
            self._recorder = Recorder(self._to or "", rank=self._rank, resume=self._resume)
        self._scene = make_scene(self._model)
        parameters = self._scene.parameters
        device_type = parameters[0].device.type if parameters else "cpu"
        if self._given_probes is None:
            from trimtab.watch.probes import default_probes

            self._given_probes = default_probes()
        self._probes = Probes(self._given_probes, device_type, self.event)
        for probe in self._probes.all:
            self._probes.call(probe, "begin", self._scene)
        describe(self.recorder, self._scene, self._optimizers, self._probes.all, every=self._every)
        if self._compiled:
            self.event("compiled", "the model is compiled: activations and attention are not looked at")
        self._handles += [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward, always_call=True),
            listen("cross_entropy", self._on_cross_entropy),
            listen("clip_grad_norm_", self._on_clip),
        ]
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        return self

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        step: int | None = None,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Close one training step: record its loss and readings. Call it once, after `optimizer.step()`.

        Args:
            loss: the step's loss, a number or a tensor with one element.
            step: the step's number; by default they count from `first_step`.
            logits: output logits [..., C], for a loss that does not go through `F.cross_entropy`.
            targets: class targets [...] for `logits`.

        Raises:
            UsageError: if the watch has not started, or `loss` has more than one element.
        """
        recorder = self.recorder
        if step is not None:
            self._step = step
        finite = True
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise UsageError(f"step takes a loss with one element, got shape {tuple(loss.shape)}: reduce it first.")
        if logits is not None and targets is not None and self.sampled:
            self._show_classification(logits, targets)
        if self._norms is None:
            self._measure_gradients()
        if self._updating:
            self._probes.broadcast("after_update", self._scene, sampled=True)
        readings = self._probes.readings(sampled=self.sampled)
        tensors = [reading.values for reading in readings]
        if isinstance(loss, Tensor):
            tensors.append(loss)
        numbers = self._to_numbers(readings, tensors)
        if loss is not None:
            value = numbers.pop()[0] if isinstance(loss, Tensor) else float(loss)
            recorder.log(self._step, "loss", value)
            finite = abs(value) < float("inf")
            if not finite:
                self._locate_non_finite(on_every_rank=False)
        self._report_non_finite(finite)
        for (name, labels, _), values in zip(readings, numbers, strict=True):
            recorder.log(self._step, name, values, labels)
        for name, labels, values in self._extra:
            recorder.log(self._step, name, values, labels)
        self._forget_step()
        self._step += 1

    def _to_numbers(self, readings: list[Reading], tensors: list[Tensor]) -> list[list[float]]:
        try:
            return to_floats(tensors)
        except Exception as error:
            self.event("probe-failed", f"readings could not be copied to the CPU: {type(error).__name__}: {error}")
            shapes = [max(1, len(reading.labels)) for reading in readings] + [1] * (len(tensors) - len(readings))
            return [[float("nan")] * shape for shape in shapes]

    def log(self, name: str, value: float | Sequence[float], labels: Sequence[str] = ()) -> None:
        """Record a signal of your own at the current step; after `step`, that is the next one."""
        self.recorder.log(self._step, name, value, labels)

    def event(self, kind: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Record an event at the current step."""
        self.recorder.event(self._step, kind, message, data)

    def flush(self) -> int:
        """Commit what was recorded and return the number of rows acknowledged in all."""
        return self.recorder.flush()

    def close(self, status: str = "finished") -> None:
        """Take every hook away and close the record. Closing twice is harmless."""
        self._end_sample()
        self._report_non_finite(loss_is_finite=False)
        for handle in self._handles:
            handle.remove() if isinstance(handle, RemovableHandle) else handle()
        self._handles.clear()
        if self._recorder is not None and self._given_recorder is None:
            self._recorder.close(status)
        elif self._given_recorder is not None:
            self._given_recorder.flush()

    def __enter__(self) -> Watch:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.event("exception", f"{type(error).__name__}: {error}")
        self.close("finished" if error is None else "failed")

    # The hooks below return None, so that torch passes on what it had.

    @harmless
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        self._inputs = (args, kwargs)
        # Gradients read before this pass are not this step's: the loop closed its step before the optimizer's.
        self._norms = None
        if self.sampled and not self._seen_forward and not self._compiled:
            self._seen_forward = True
            self._sample = ForwardSample(module, self._probes)

    @harmless
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._end_sample()

    def _end_sample(self) -> None:
        if self._sample is not None:
            self._sample.close()
            self._sample = None

    @harmless
    def _on_cross_entropy(self, *args: Any, **kwargs: Any) -> None:
        if not self.sampled or not torch.is_grad_enabled():
            return
        logits = args[0] if args else kwargs.get("input")
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(logits, Tensor) and isinstance(targets, Tensor) and logits.requires_grad:
            self._show_classification(logits, targets, ignore_index=kwargs.get("ignore_index", -100))

    @harmless
    def _show_classification(self, logits: Tensor, targets: Tensor, ignore_index: int = -100) -> None:
        """Bring logits to [N, C] and class targets to [N], without the ignored ones; other targets are left alone."""
        if targets.is_floating_point() or logits.ndim != targets.ndim + 1:
            return
        logits, targets = logits.detach(), targets.detach()
        if logits.ndim > 2 and logits.shape[1:] != targets.shape and logits.shape[2:] == targets.shape[1:]:
            logits = logits.movedim(1, -1)
        self.recorder.meta("n_classes", logits.shape[-1])
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        kept = targets != ignore_index
        if not bool(kept.all()):
            logits, targets = logits[kept], targets[kept]
        if len(targets):
            self._probes.broadcast("on_classification", logits, targets, sampled=True)

    @harmless
    def _on_clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> None:
        if self._norms is not None:
            return
        self._measure_gradients()
        total = self._total_norm()
        if norm_type == 2.0 and total is not None:
            self._extra.append(("grad_clip", (), [min(1.0, float(max_norm) / (total + 1e-6))]))

    def _total_norm(self) -> float | None:
        return None if self._norms is None else sum(norm * norm for norm in self._norms) ** 0.5

    @harmless
    def _measure_gradients(self) -> None:
        """Show the probes the gradients, and look whether they are finite, once a step."""
        gradients = [parameter.grad for parameter in self._scene.parameters]
        if not any(gradient is not None for gradient in gradients):
            return
        with torch.no_grad():
            found = iter(l2_norms([gradient for gradient in gradients if gradient is not None]))
            device = self._scene.parameters[0].device
            zero = torch.zeros((), device=device)
            norms = [next(found) if gradient is not None else zero for gradient in gradients]
            self._probes.broadcast("on_gradients", self._scene, norms, sampled=self.sampled)
            self._norms = [value for (value,) in to_floats(norms)]
        if not sum(self._norms) < float("inf"):
            self._locate_non_finite(on_every_rank=True)

    def _locate_non_finite(self, *, on_every_rank: bool) -> None:
        """Locate a non-finite value when a stretch of them begins; within the stretch there is nothing new to see.

        With several ranks nothing is run or gathered that the others do not run too: a forward pass alone would hang.
        """
        if self._episode or self._located >= nonfinite.MOST:
            self._episode = True
            return
        self._episode = True
        self._located += 1
        if self._ranks > 1 and not on_every_rank:
            self._origin = nonfinite.Origin("", "loss", "loss", "the loss of this rank is not finite")
            return
        args, kwargs = self._inputs if self._ranks == 1 else ((), {})
        try:
            self._origin = nonfinite.locate(self._model, args, kwargs, self._scene.names, self._norms or ())
        except Exception as error:
            self._origin = nonfinite.Origin("", "unknown", "", f"not located: {type(error).__name__}: {error}")

    def _report_non_finite(self, loss_is_finite: bool) -> None:
        """Record where the step's non-finite value arose, now that its loss is known; a clean step ends the stretch."""
        origin, self._origin = self._origin, None
        if origin is not None:
            if origin.tensor == "loss" and loss_is_finite:
                origin = nonfinite.OVERFLOW
            self.event("non-finite", origin.message, origin.data())
        elif loss_is_finite and self._norms is not None and sum(self._norms) < float("inf"):
            self._episode = False

    @harmless
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        # A closure computes the gradients inside the step: they are read at its end.
        closure = kwargs.get("closure") or any(callable(entry) for entry in args if entry is not optimizer)
        if self._norms is None and not closure:
            self._measure_gradients()
        rate = optimizer.param_groups[0].get("lr")
        if optimizer is self._optimizers[0] and rate is not None:
            self._extra.append(("lr", (), [float(rate)]))
        if self.sampled and not self._updating:
            self._updating = True
            self._probes.broadcast("before_update", self._scene, sampled=True)
