"""The loop that trains a workload: watched or not, resumable bit for bit."""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.catalogue import method
from trimtab.errors import RecordError, UsageError
from trimtab.record import Recorder, Run, latest_checkpoint, load_checkpoint, save_checkpoint
from trimtab.record.checkpoint import rng_state, set_rng_state
from trimtab.remedy import apply
from trimtab.scalars import to_scalar
from trimtab.workloads.outcome import Outcome, mechanism
from trimtab.workloads.settings import Settings
from trimtab.workloads.workload import Workload, seeded
from trimtab.workloads.workload import workload as find_workload

if TYPE_CHECKING:
    from trimtab.watch.watch import Watch

Progress = Callable[[int, int, float], None]


def train(
    workload: Workload | str,
    settings: Settings | None = None,
    *,
    out: str | Path | None = None,
    watch: bool = True,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: Progress | None = None,
    text: str | Path | None = None,
) -> Outcome:
    """Train a workload and return what came out.

    The result is a pure function of workload, settings, text and torch's version; watching changes nothing in it, and
    neither does an interruption that is resumed. The number of torch threads is the caller's.

    Args:
        workload: a workload or its name.
        settings: the run's settings; the workload's defaults if left out.
        out: folder of the record and the checkpoints; nothing is written or watched without one.
        watch: whether the signals of the default probes are recorded, or only loss, learning rate and gradient norm.
        resume: continue the run in `out` from its newest checkpoint.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        progress: called after each step with the steps done, the steps in all and the loss.
        text: a file or folder of text, for language models.

    Returns:
        The outcome. A loss that is not finite ends the run early: `diverged` is then true and `loss` the one at
        initialisation.

    Raises:
        UsageError: if a setting cannot be used, or the folder holds a run with other settings.
        RecordError: if the folder cannot be written, or holds a run and `resume` is false.
        KeyboardInterrupt: on Ctrl-C, once the step in hand is finished and a checkpoint written.

    Example:
        >>> from trimtab.workloads import workload
        >>> mlp = workload("digits-mlp")
        >>> train(mlp, mlp.defaults.replace(steps=20)).diverged
        False
    """
    if isinstance(workload, str):
        workload = find_workload(workload)
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise UsageError("resume needs the folder of the run to continue: give out=FOLDER.")
    data = workload.prepare(text)
    asked = settings or workload.defaults
    identity = {"workload": workload.name, **asked.model_dump(mode="json"), "data": data.sha256}
    workload.batch(asked.seed, 0, asked.batch_size)  # a batch that cannot be is refused before anything is written
    with seeded(asked.seed):
        run = _Training(workload, asked, identity)
        saved = _saved(folder, identity) if folder is not None and resume else None
        with ExitStack() as stack:
            recorder, watcher = _open(stack, run, folder, watch, resume, saved)
            run.start(saved, recorder)
            run.loop(folder, recorder, watcher, checkpoint_every, progress, stack.enter_context(_interruptible()))
        return run.outcome(folder)


class _Interrupt:
    """Whether Ctrl-C was pressed."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    """Hold Ctrl-C back until the step in hand is finished; a second one stops at once."""
    interrupt = _Interrupt()
    usual = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers, and a caller that ignores Ctrl-C or handles it itself keeps doing so.
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, usual)


def _saved(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state in a run's newest checkpoint (None if it was killed before the first), once it is this run's."""
    if not folder.exists() or not any(folder.iterdir()):
        raise UsageError(f"{folder} holds no run to resume: leave out resume to start one there.")
    newest = latest_checkpoint(folder)
    if newest is None:
        saved, found = None, identity
        with contextlib.suppress(RecordError), Run(folder) as run:  # one that was killed while it was created
            found = run.meta.get("identity", identity)
    else:
        _, saved = load_checkpoint(newest)
        found = saved["identity"]
    for name, value in identity.items():
        if found.get(name) != value:
            raise UsageError(
                f"{folder} holds a run with other settings: {name} is {found.get(name)!r} there and {value!r} here. "
                "Resume it with its own settings, or choose another folder."
            )
    return saved


def _open(
    stack: ExitStack,
    run: _Training,
    folder: Path | None,
    watch: bool,
    resume: bool,
    saved: dict[str, Any] | None,
) -> tuple[Recorder | None, Watch | None]:
    if folder is None:
        return None, None
    watcher = None
    if watch:
        from trimtab.watch.watch import Watch

        first = 0 if saved is None else saved["progress"]["step"]
        watcher = stack.enter_context(Watch(run.model, run.optimizer, to=folder, resume=resume, first_step=first))
        recorder = watcher.recorder
    else:
        recorder = stack.enter_context(Recorder(folder, resume=resume))
        recorder.meta("parameters", {name: p.numel() for name, p in run.model.named_parameters()})
        recorder.meta(
            "environment",
            {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        )
    recorder.meta("workload", run.workload.name)
    recorder.meta("config", run.asked.model_dump(mode="json"))
    recorder.meta("identity", run.identity)
    return recorder, watcher


@dataclass
class _Progress:
    """What a checkpoint holds besides weights and optimizer."""

    step: int = 0
    initial_loss: float = math.nan
    cpu_seconds: float = 0.0


class _Training:
    """Model, optimizer and loss of one run, and where it stands."""

    def __init__(self, workload: Workload, asked: Settings, identity: dict[str, Any]) -> None:
        self.workload = workload
        self.asked = asked
        self.identity = identity
        self.settings = asked
        self.model = workload.model(asked.seed)
        self.loss: Callable[[Tensor, Tensor], Tensor] = workload.loss
        self.applied: list[tuple[str, dict[str, str]]] = []
        for name in asked.remedies:
            self._apply(name)
        self.optimizer = _optimizer(self.model, self.settings)
        # Remedies may draw random numbers; dropout must be the same with and without them.
        torch.manual_seed(asked.seed)
        self.at = _Progress()
        self.metrics: dict[str, float] = {}
        self.diverged = False

    def _apply(self, name: str) -> None:
        card = method(name)
        if card.acts_on == "model":
            self.applied.append((name, dict(apply(self.model, name).changes)))
        elif card.apply is None:
            raise UsageError(f"{name} cannot be applied to a run.")
        elif card.acts_on == "loss":
            self.loss = card.apply(self.loss)
            self.applied.append((name, {"loss": card.equation}))
        else:
            before = self.settings.model_dump()
            after = dict(card.apply(before))
            self.settings = Settings(**after)
            changed = {key: f"{before[key]} -> {after[key]}" for key in before if before[key] != after[key]}
            self.applied.append((name, changed))

    def start(self, saved: dict[str, Any] | None, recorder: Recorder | None) -> None:
        """Continue from a checkpoint's state, or evaluate the model at initialisation."""
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            set_rng_state(saved["rng"])
            self.at = _Progress(**saved["progress"])
        else:
            self.at.initial_loss = self.workload.evaluate(self.model)["loss"]
        if recorder is None:
            return
        recorder.meta("initial_loss", self.at.initial_loss)
        if saved is not None:
            recorder.event(self.at.step, "resumed", f"resumed after {self.at.step} steps")
            return
        for name, changes in self.applied:
            recorder.event(0, "applied", f"{name} was applied", {"method": name, "changes": changes})

    def loop(
        self,
        folder: Path | None,
        recorder: Recorder | None,
        watcher: Watch | None,
        checkpoint_every: int,
        progress: Progress | None,
        interrupt: _Interrupt,
    ) -> None:
        """Train to the end of the schedule, a loss that is not finite, or Ctrl-C."""
        steps = self.settings.steps
        evaluate_every = max(1, steps // self.workload.evaluations)
        while self.at.step < steps and not self.diverged:
            loss = self.step(recorder, watcher)
            if self.diverged:
                break
            self.at.step += 1
            if self.at.step % evaluate_every == 0 and self.at.step < steps:
                self.evaluate(recorder)
            if checkpoint_every and self.at.step % checkpoint_every == 0 and self.at.step < steps:
                self.save(folder, recorder)
            if progress is not None:
                progress(self.at.step, steps, loss)
            if interrupt.asked:
                self.save(folder, recorder)
                if recorder is not None:
                    recorder.close("interrupted")
                raise KeyboardInterrupt
        if not self.diverged:
            self.evaluate(recorder)
            self.diverged = not math.isfinite(self.metrics["loss"])
        self.save(folder, recorder, final=True)
        if self.diverged and recorder is not None:
            recorder.close("diverged")

    def step(self, recorder: Recorder | None, watcher: Watch | None) -> float:
        """Take one optimizer step and return its loss; a loss that is not finite leaves the weights as they are."""
        began = time.process_time()
        settings, at = self.settings, self.at.step
        lr = settings.learning_rate(at)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        inputs, targets = self.workload.batch(settings.seed, at, settings.batch_size)
        loss = self.loss(self.model(inputs), targets)
        value = to_scalar(loss)
        loss.backward()
        norm = None
        if settings.clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.diverged = not math.isfinite(value)
        if not self.diverged:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if watcher is not None:
            watcher.step(loss, step=at)
        elif recorder is not None:
            recorder.log(at, "loss", value)
            recorder.log(at, "lr", lr)
            if norm is not None:
                recorder.log(at, "grad_norm", to_scalar(norm))
        self.at.cpu_seconds += time.process_time() - began
        return value

    def evaluate(self, recorder: Recorder | None) -> None:
        """Evaluate on the test part; no random number is drawn and the model's modes stay as they are."""
        self.metrics = self.workload.evaluate(self.model)
        if recorder is not None:
            for name, value in self.metrics.items():
                # The accuracy on the training batches is the watch's signal; the one on the whole part is an outcome.
                if not name.startswith("train_"):
                    recorder.log(self.at.step - 1, f"eval_{name}", value)

    def save(self, folder: Path | None, recorder: Recorder | None, *, final: bool = False) -> None:
        """Write a checkpoint. Only the last one's failure ends the run; another is tried at the next occasion."""
        if folder is None or recorder is None:
            return
        # Rows first: a resumed run does not log again what lies before its checkpoint.
        recorder.flush()
        state = {
            "identity": self.identity,
            "progress": vars(self.at).copy(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
        }
        try:
            path = save_checkpoint(folder, self.at.step, state)
        except RecordError as error:
            if final:
                raise
            warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=2)
            return
        recorder.event(self.at.step, "checkpoint", f"checkpoint after {self.at.step} steps", {"path": str(path)})
        recorder.flush()

    def outcome(self, folder: Path | None) -> Outcome:
        """Return what came out."""
        return Outcome(
            workload=self.workload.name,
            settings=self.asked.model_dump(mode="json"),
            loss=self.at.initial_loss if self.diverged else self.metrics["loss"],
            metrics={} if self.diverged else dict(self.metrics),
            initial_loss=self.at.initial_loss,
            diverged=self.diverged,
            steps=self.at.step,
            cpu_seconds_per_step=self.at.cpu_seconds / max(1, self.at.step),
            mechanism={} if folder is None else mechanism(folder),
            folder=None if folder is None else str(folder),
        )


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
