"""The work on a population: decide where an interval starts from, train it, hand it in; by any number of workers."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.compare.store import read_json
from trimtab.errors import RecordError, RunFailedError
from trimtab.record import save_checkpoint
from trimtab.tune.population._exploit import draw, exploit, explore, initial
from trimtab.tune.population._members import PLAN, Members
from trimtab.tune.search.lease import Lease
from trimtab.tune.search.space import Range, dimension_from_json
from trimtab.workloads import Settings, Workload
from trimtab.workloads import workload as find_workload
from trimtab.workloads.session import Session, Standing
from trimtab.workloads.workload import seeded

Report = Callable[[int, float], None]
"""Called after each step with the steps of the interval done and the loss."""

_PAUSE = 0.05
_TRIES = 5


@dataclass(frozen=True)
class Plan:
    """What a population's intervals need to know, as the folder's plan says it."""

    settings: Settings
    space: Mapping[str, Range]
    members: int
    interval: int
    exploit: str
    share: float
    factors: tuple[float, ...]
    resample: float
    metric: str
    higher_is_better: bool
    synchronous: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that a file holds."""
        space = {name: dimension_from_json(value) for name, value in data["space"].items()}
        return cls(
            settings=Settings(**data["settings"]),
            space={name: dimension for name, dimension in space.items() if isinstance(dimension, Range)},
            factors=tuple(data["factors"]),
            **{name: data[name] for name in cls.__dataclass_fields__ if name not in ("settings", "space", "factors")},
        )

    @property
    def intervals(self) -> int:
        """Intervals of each member; the last may be shorter."""
        return math.ceil(self.settings.steps / self.interval)

    def settings_of(self, member: int, values: Mapping[str, Any]) -> Settings:
        """Return a member's settings: its own seed, and the values in hand."""
        return self.settings.replace(**values, seed=self.settings.seed + member)

    def fitness(self, record: Mapping[str, Any]) -> float:
        """Return a record's score so that higher is better; -inf for a member that diverged."""
        if record["score"] is None:
            return -math.inf
        return float(record["score"]) if self.higher_is_better else -float(record["score"])


def worker_job(arguments: Mapping[str, Any], folder: Path, report: Report) -> dict[str, Any]:
    """Work in a process of its own until the population is finished; a task of `trimtab.compare.pool`."""
    work(Path(arguments["home"]), arguments["workload"], arguments["text"], report)
    return {}


def work(home: Path, name: str, text: str | None, report: Report | None = None) -> None:
    """Take interval after interval until all are finished, by whomever.

    Args:
        home: the population's folder, with its plan.
        name: of the workload.
        text: for language models; not part of the plan, as hosts may have it in different places.
        report: called after each step, and with 0 after each interval.
    """
    document = read_json(home / PLAN)
    if document is None:
        raise RecordError(f"{home / PLAN} cannot be read.")
    plan = Plan.from_json(document)
    workload = find_workload(name)
    workload.prepare(text)
    members = Members(home, plan.members, plan.intervals, synchronous=plan.synchronous)
    with contextlib.closing(Lease(home / "leases")) as lease:
        while True:
            members.refresh()
            if members.finished():
                return
            for member, interval in members.open():
                if members.claim(member, interval, lease):
                    _run(plan, members, workload, member, interval, lease.worker, report)
                    break
            else:
                time.sleep(_PAUSE)  # all that is open is in other hands


def _run(
    plan: Plan, members: Members, workload: Workload, member: int, interval: int, worker: str, report: Report | None
) -> None:
    members.refresh()
    decision, state = _start(plan, members, member, interval)
    values = decision["hyperparameters"]
    first = interval * plan.interval
    last = min(first + plan.interval, plan.settings.steps)
    settings = plan.settings_of(member, values)
    with seeded(settings.seed):
        run = Session(workload, settings, {})
        if state is not None:
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            if values != (before := state["hyperparameters"]):
                _turn(run, Session(workload, plan.settings_of(member, before), {}), settings, workload)
        run.at = Standing(step=first)
        torch.manual_seed(int(draw(plan.settings.seed, member, interval, "steps") * 2**48))
        loss = math.nan
        while run.at.step < last and not run.diverged:
            loss = run.step(None, None)
            if run.diverged:
                break
            run.at.step += 1
            if report is not None:
                report(run.at.step - first, loss)
        score: float | None = None
        if not run.diverged:
            run.evaluate(None)
            score = run.metrics[plan.metric]
            run.diverged = not math.isfinite(score) or not math.isfinite(run.metrics["loss"])
        place = members.checkpoint_folder(member, interval, worker)
        if not run.diverged:
            kept = {
                "model": dict(run.model.state_dict()),
                "optimizer": run.optimizer.state_dict(),
                "hyperparameters": dict(values),
            }
            try:
                save_checkpoint(place, last, kept, keep=1)
            except RecordError:
                members.refresh()
                if len(members.records(member)) > interval:  # finished by another, who cleared our place away
                    return
                raise
    members.finish(
        member,
        interval,
        {
            "member": member,
            "interval": interval,
            "step": last,
            "steps": last - first,
            "score": None if run.diverged else score,
            "metrics": {} if run.diverged else run.metrics,
            "diverged": run.diverged,
            "action": decision["action"],
            "parent": decision["parent"],
            "hyperparameters": values,
            "checkpoint": None if run.diverged else place.relative_to(members.home).as_posix(),
            "worker": worker,
        },
    )
    if report is not None:
        report(0, loss)


def _turn(run: Session, before: Session, settings: Settings, workload: Workload) -> None:
    """Give the optimizer's groups what the new values change in them; all else stays as the checkpoint had it."""
    fresh = Session(workload, settings, {}).optimizer.param_groups
    for group, new, old in zip(run.optimizer.param_groups, fresh, before.optimizer.param_groups, strict=True):
        for name, value in new.items():
            if name != "params" and value != old[name]:
                group[name] = value


def _start(plan: Plan, members: Members, member: int, interval: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the decision on an interval and the state it starts from; the decision is on file before a step is."""
    for _ in range(_TRIES):
        decision = members.decision(member, interval)
        known = decision is not None
        if decision is None:
            decision = json.loads(json.dumps(decide(plan, members, member, interval)))
        state = None
        if decision["parent"] is not None:
            state = members.state(*decision["parent"])
            if state is None:  # whoever was to be copied is far ahead by now
                members.refresh()
                continue
        if known or members.decide(member, interval, decision) == decision:
            return decision, state
    raise RunFailedError(
        f"the state that interval {interval} of member {member} starts from is gone: its checkpoint was removed."
    )


def decide(plan: Plan, members: Members, member: int, interval: int) -> dict[str, Any]:
    """Return where an interval starts from, and with which values: a pure function of the seed and of `seen`.

    Args:
        plan: of the population.
        members: where they stand.
        member: whose interval it is.
        interval: from 0.

    Returns:
        `action` ("start", "continue", "exploit" or "restart"), `parent` (the member and interval whose state is taken
        on, or None), `hyperparameters`, and `seen`: the fitnesses of each member that were compared, latest last.
    """
    key = (plan.settings.seed, member, interval)
    if interval == 0:
        return {"action": "start", "parent": None, "hyperparameters": initial(plan.space, key), "seen": {}}
    records = {
        other: members.records(other)[: interval if plan.synchronous or other == member else None]
        for other in range(plan.members)
    }
    records = {other: known for other, known in records.items() if known}
    seen = {other: [plan.fitness(record) for record in known[-10:]] for other, known in records.items()}
    own = records[member][-1]
    donor = exploit(plan.exploit, seen, member, plan.share, key)
    shown = {str(other): values for other, values in seen.items()}
    if donor is not None:
        parent = records[donor][-1]
        values = explore(parent["hyperparameters"], plan.space, plan.factors, plan.resample, key)
        return {
            "action": "exploit",
            "parent": [donor, parent["interval"]],
            "hyperparameters": values,
            "seen": shown,
        }
    if own["diverged"]:  # and nobody else lives
        return {"action": "restart", "parent": None, "hyperparameters": initial(plan.space, key), "seen": shown}
    values = own["hyperparameters"]
    return {"action": "continue", "parent": [member, interval - 1], "hyperparameters": values, "seen": shown}
