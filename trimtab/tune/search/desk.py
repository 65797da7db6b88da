"""Where workers take trials and hand in how they ended: all that they share is the journal and their leases.

A trial is taken under a lock, so that there are never more of them than were asked for. A trial whose worker died is
taken again under its own number, with the values it had. How a trial ended is written before the trial is closed: a
worker that dies in between has finished it, and nothing is run twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError, require
from trimtab.tune.search.journal import NAME, SharedLock, open_storage, quiet
from trimtab.tune.search.lease import Lease
from trimtab.tune.search.samplers import sampler_for
from trimtab.tune.search.space import dimension_from_json

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_ATTEMPTS = 5
"""How often a trial is begun before its workers' deaths count as its own fault."""

_PATIENCE = 600.0
"""Seconds that drawing a trial's values may take on another host before its lock counts as a dead one's."""

_PLAN, _CLAIM, _ENDING = "plan", "claim", "ending"

Draw = Callable[["Drawing"], Mapping[str, Any]]
"""Draws the values of a trial that are known before it runs."""


@dataclass(frozen=True)
class Ticket:
    """A trial in the hands of a worker.

    Attributes:
        number: from 0.
        values: what was drawn for it so far, by name.
        attempt: 1, or more if workers died over it.
        trial: Optuna's.
    """

    number: int
    values: Mapping[str, Any]
    attempt: int
    trial: Trial


class Desk:
    """A worker's access to a tuning's journal.

    Args:
        folder: the tuning's folder.
        worker: a name for the worker; made up if left out.

    Raises:
        RecordError: if the folder cannot be written.
        MissingExtraError: if optuna is not installed.
    """

    def __init__(self, folder: str | Path, worker: str = "") -> None:
        self.folder = Path(folder)
        self._optuna = require("optuna", extra="tune")
        self._storage = open_storage(self.folder)
        self._lock = SharedLock(self.folder / ".desk", patience=_PATIENCE)
        self._lease: Lease | None = None
        self._name = worker
        self._study: Study | None = None

    @property
    def lease(self) -> Lease:
        """What shows others that this worker lives; made when the first trial is taken."""
        if self._lease is None:
            self._lease = Lease(self.folder / "workers", self._name)
        return self._lease

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self.lease.worker

    def close(self) -> None:
        """Give up the lease; trials still in hand are then free for others."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Make the study with its plan, or see that the one in the folder has the same.

        Raises:
            UsageError: if it has another plan.
        """
        with self._lock, quiet():
            self._study = self._optuna.create_study(
                study_name=NAME,
                storage=self._storage,
                direction="maximize" if plan["maximize"] else "minimize",
                load_if_exists=True,
            )
            found = self._study.user_attrs.get(_PLAN)
            if found is None:
                self._study.set_user_attr(_PLAN, json.loads(json.dumps(plan)))
                return
        asked = json.loads(json.dumps(plan))
        for name in ["space", *found, *asked]:  # other entries follow from the space
            if found.get(name) != asked.get(name):
                there, here = (_short(name, plan.get(name)) for plan in (found, asked))
                raise UsageError(
                    f"{self.folder} holds a tuning with another {name}: {there} there, {here} here. "
                    "Give it the same, or choose another folder."
                )

    @property
    def study(self) -> Study:
        """The study in the folder.

        Raises:
            UsageError: if there is none.
        """
        if self._study is None:
            try:
                with quiet():
                    self._study = self._optuna.load_study(study_name=NAME, storage=self._storage)
            except KeyError:
                raise UsageError(f"{self.folder} holds no tuning: start one there.") from None
        return self._study

    @property
    def plan(self) -> dict[str, Any]:
        """What the tuning is about."""
        return dict(self.study.user_attrs[_PLAN])

    def trials(self) -> list[FrozenTrial]:
        """Return every trial, by number."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> int:
        """Return how many trials have ended, however they did."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def claim(self, trials: int, draw: Draw, *, wait: Callable[[], bool]) -> Ticket | None:
        """Take a trial: a new one, or one whose worker died.

        Args:
            trials: how many there are to be in all.
            draw: draws the values that are known beforehand.
            wait: called while all that is left runs elsewhere; returns whether to look again, after a pause.

        Returns:
            The trial, or None once all of them have ended, or `wait` gives up.
        """
        while True:
            with self._lock:
                found, left = self._take(trials, draw)
            if found is not None or not left or not wait():
                return found

    def _take(self, trials: int, draw: Draw) -> tuple[Ticket | None, bool]:
        """Return a trial or None, and whether others still run."""
        known = self.trials()
        running = [trial for trial in known if not trial.state.is_finished()]
        for trial in running:
            claim = trial.user_attrs.get(_CLAIM) or {}
            if self.lease.lives(str(claim.get("worker", ""))):
                continue
            if _ENDING in trial.user_attrs:
                self._close(trial.number, trial.user_attrs[_ENDING])
                continue
            attempt = int(claim.get("attempt", 0)) + 1
            if attempt > _ATTEMPTS:
                reason = f"its worker died {_ATTEMPTS} times"
                self._end(trial._trial_id, trial.number, {"status": "failed", "value": None, "reason": reason})
                continue
            self._storage.set_trial_user_attr(trial._trial_id, _CLAIM, {"worker": self.worker, "attempt": attempt})
            drawing = Drawing(self._own_study(trial.number), trial)
            return self._ticket(trial._trial_id, trial.number, attempt, draw(drawing)), False
        if len(known) < trials:
            return self._new(len(known), draw), False
        return None, any(not trial.state.is_finished() for trial in self.trials())

    def _new(self, number: int, draw: Draw) -> Ticket:
        """Add a trial with its values and our name in one line of the journal: it is there whole or not at all."""
        study = self._own_study(number)
        trials = self._optuna.trial
        drawing = Drawing(study, trials.create_trial(state=trials.TrialState.RUNNING))
        drawing.trial.number = number
        with quiet():
            study.sampler.before_trial(study, drawing.trial)
            values = dict(draw(drawing))
            study.add_trial(
                trials.create_trial(
                    state=trials.TrialState.RUNNING,
                    params=drawing.trial.params,
                    distributions=drawing.trial.distributions,
                    user_attrs={_CLAIM: {"worker": self.worker, "attempt": 1}},
                )
            )
        return self._ticket(self.trials()[number]._trial_id, number, 1, values)

    def _own_study(self, number: int) -> Study:
        """Return the study with the sampler of a trial; a new one, as Optuna's keeps what it has read of the others."""
        plan = self.plan
        with quiet():
            sampler = sampler_for(plan["sampler"], plan["seed"], number)
            pruner = self._optuna.pruners.MedianPruner()
            study: Study = self._optuna.load_study(
                study_name=NAME, storage=self._storage, sampler=sampler, pruner=pruner
            )
        return study

    def _ticket(self, trial_id: int, number: int, attempt: int, values: Mapping[str, Any]) -> Ticket:
        with quiet():
            trial = self._optuna.trial.Trial(self._own_study(number), trial_id)
        return Ticket(number, dict(values), attempt, trial)

    def finish(self, ticket: Ticket, ending: Mapping[str, Any]) -> bool:
        """Hand in how a trial ended.

        Args:
            ticket: the trial.
            ending: plain JSON data with `status` ("finished", "pruned" or "failed") and `value`.

        Returns:
            False if the trial was taken by another worker meanwhile, which hands it in.
        """
        with self._lock:
            now = self._storage.get_trial(ticket.trial._trial_id)
            if now.state.is_finished() or now.user_attrs[_CLAIM]["worker"] != self.worker:
                return False
            self._end(ticket.trial._trial_id, ticket.number, ending)
        return True

    def _end(self, trial_id: int, number: int, ending: Mapping[str, Any]) -> None:
        self._storage.set_trial_user_attr(trial_id, _ENDING, dict(ending))
        self._close(number, ending)

    def _close(self, number: int, ending: Mapping[str, Any]) -> None:
        state = self._optuna.trial.TrialState
        value = ending.get("value")
        with quiet():
            if ending["status"] == "failed" or value is None:
                self.study.tell(number, state=state.FAIL)
            elif ending.get("behind"):
                self.study.tell(number, state=state.PRUNED)
            else:
                self.study.tell(number, value)

    def release(self, workers: str) -> None:
        """Take back the attempt of the trials of workers that were stopped on purpose.

        Args:
            workers: what their names begin with.
        """
        with self._lock:
            for trial in self.trials():
                claim = trial.user_attrs.get(_CLAIM) or {}
                if not trial.state.is_finished() and str(claim.get("worker", "")).startswith(workers):
                    back = {**claim, "attempt": max(0, int(claim["attempt"]) - 1)}
                    self._storage.set_trial_user_attr(trial._trial_id, _CLAIM, back)


class Drawing:
    """Draws the values of a trial before it is in the journal; to a space it looks like Optuna's trial.

    Args:
        study: with the trial's sampler.
        trial: what is known of it: values that it has already are kept.
    """

    def __init__(self, study: Study, trial: FrozenTrial) -> None:
        self.trial = trial
        self._study = study
        self._together: Mapping[str, Any] | None = None
        self._kinds = require("optuna.distributions", extra="tune")

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """Draw a number."""
        return float(self._draw(name, self._kinds.FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Draw a whole number."""
        return int(self._draw(name, self._kinds.IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draw one of several values."""
        return self._draw(name, self._kinds.CategoricalDistribution(choices))

    def _draw(self, name: str, distribution: BaseDistribution) -> Any:
        trial, study = self.trial, self._study
        if name in trial.params:
            return trial.params[name]
        if self._together is None:
            space = study.sampler.infer_relative_search_space(study, trial)
            self._together = study.sampler.sample_relative(study, trial, space)
        value = self._together.get(name)
        if value is None or not distribution._contains(distribution.to_internal_repr(value)):
            value = study.sampler.sample_independent(study, trial, name, distribution)
        trial.params = {**trial.params, name: value}
        trial.distributions = {**trial.distributions, name: distribution}
        return value


def _short(name: str, value: Any) -> str:
    if name == "space":
        text = " ".join(f"{key}={dimension_from_json(data)}" for key, data in value.items()) or "none"
    else:
        text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
