"""Taking trials and handing them in: never too many, none twice, a dead worker's again with the same values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.tune.search.desk import Desk, Ticket
from trimtab.tune.search.lease import Lease
from trimtab.tune.search.space import Range

optuna = pytest.importorskip("optuna")

PLAN = {"kind": "function", "function": "f", "space": {}, "metric": "loss", "maximize": False, "sampler": "tpe",
        "seed": 0, "prune": True, "median": False}  # fmt: skip
X = Range(-2, 2)
K = Range(1, 9, integer=True)


def draw(trial: Any) -> dict[str, Any]:
    return {"x": X.suggest(trial, "x"), "k": K.suggest(trial, "k")}


def take(desk: Desk, trials: int) -> Ticket | None:
    return desk.claim(trials, draw, wait=lambda: False)


def end(desk: Desk, ticket: Ticket, value: float) -> bool:
    return desk.finish(ticket, {"status": "finished", "value": value})


@pytest.fixture
def desks(tmp_path: Path) -> Any:
    """Two workers at one journal."""
    with Desk(tmp_path) as first, Desk(tmp_path) as second:
        first.begin(PLAN)
        second.begin(PLAN)
        yield first, second


def test_never_more_trials_than_asked_for(desks: Any) -> None:
    first, second = desks
    tickets = [take(desk, 3) for desk in (first, second, first)]
    assert [ticket and ticket.number for ticket in tickets] == [0, 1, 2]
    assert take(second, 3) is None, "all three run"
    assert end(first, tickets[0], 1.0)
    assert take(second, 3) is None, "what has ended counts"
    assert end(second, tickets[1], 1.0)
    assert end(first, tickets[2], 1.0)
    assert first.finished() == 3
    assert take(second, 3) is None
    more = take(second, 4)
    assert more is not None
    assert more.number == 3


def test_waiting_is_asked_for_while_others_run_only(desks: Any) -> None:
    first, second = desks
    ticket = take(first, 1)
    looks = []

    def wait() -> bool:
        looks.append(1)
        if len(looks) == 3:
            end(first, ticket, 0.0)
        return True

    assert second.claim(1, draw, wait=wait) is None
    assert len(looks) == 3


def test_a_dead_workers_trial_keeps_number_and_values(tmp_path: Path) -> None:
    with Desk(tmp_path) as first:
        first.begin(PLAN)
        ticket = take(first, 5)
    assert ticket is not None
    with Desk(tmp_path) as second:
        again = take(second, 5)
        assert again is not None
        assert (again.number, again.values, again.attempt) == (ticket.number, ticket.values, 2)
        assert not first.finish(ticket, {"status": "finished", "value": 9.0}), "it is in other hands"
        assert end(second, again, 1.0)
        assert not end(second, again, 2.0), "it is closed"
        assert [trial.value for trial in second.trials()] == [1.0]
    first.close()


def test_what_was_handed_in_is_not_run_again(tmp_path: Path) -> None:
    with Desk(tmp_path) as first:
        first.begin(PLAN)
        ticket = take(first, 2)
        assert ticket is not None
        # Dead between writing how it ended and closing it.
        first._storage.set_trial_user_attr(ticket.trial._trial_id, "ending", {"status": "finished", "value": 0.5})
    with Desk(tmp_path) as second:
        following = take(second, 2)
        assert following is not None
        assert following.number == 1
        assert second.trials()[0].value == 0.5


def test_a_trial_that_takes_its_workers_down_is_given_up(tmp_path: Path) -> None:
    for attempt in range(1, 6):
        with Desk(tmp_path) as desk:
            desk.begin(PLAN)
            ticket = take(desk, 1)
            assert ticket is not None
            assert ticket.attempt == attempt
    with Desk(tmp_path) as desk:
        assert take(desk, 1) is None
        (trial,) = desk.trials()
        assert trial.state == optuna.trial.TrialState.FAIL
        assert trial.user_attrs["ending"]["reason"] == "its worker died 5 times"


def test_an_interruption_is_no_attempt(tmp_path: Path) -> None:
    for _ in range(8):
        with Desk(tmp_path) as desk:
            desk.begin(PLAN)
            ticket = take(desk, 1)
            assert ticket is not None
            assert ticket.attempt == 1
            desk.release(desk.worker)


def test_another_plan_is_refused_by_name(desks: Any, tmp_path: Path) -> None:
    with Desk(tmp_path) as third:
        with pytest.raises(UsageError, match="another seed: 0 there, 1 here"):
            third.begin({**PLAN, "seed": 1})
        space = {"lr": {"low": 1e-4, "high": 0.1, "log": True, "integer": False, "step": 0.0}}
        with pytest.raises(UsageError, match=r"another space: none there, lr=0\.0001:0\.1:log here"):
            third.begin({**PLAN, "applies": {"lr": [[]]}, "space": space})
        third.begin(PLAN)
    with Desk(tmp_path / "empty") as empty, pytest.raises(UsageError, match="holds no tuning"):
        empty.plan  # noqa: B018


@pytest.mark.parametrize("name", ["random", "tpe", "qmc"])
def test_draws_are_those_of_optunas_own_ask(tmp_path: Path, name: str) -> None:
    """A study in memory, asked by Optuna itself with the sampler of each trial, is the oracle."""
    from trimtab.tune.search.journal import quiet
    from trimtab.tune.search.samplers import sampler_for

    def objective(x: float, k: int) -> float:
        return (x - 1) ** 2 + 0.1 * k

    study = optuna.create_study()
    with Desk(tmp_path) as desk:
        desk.begin({**PLAN, "sampler": name})
        for number in range(14):
            ticket = take(desk, 14)
            assert ticket is not None
            with quiet():
                study.sampler = sampler_for(name, 0, number)
                trial = study.ask()
                x, k = trial.suggest_float("x", -2, 2), trial.suggest_int("k", 1, 9)
            assert ticket.values == {"x": X.rounded(x), "k": k}
            study.tell(trial, objective(x, k))
            end(desk, ticket, objective(x, k))


def test_a_trial_is_one_line_of_the_journal(desks: Any, tmp_path: Path) -> None:
    before = len((tmp_path / "journal.log").read_text().splitlines())
    assert take(desks[0], 9) is not None
    lines = [json.loads(line) for line in (tmp_path / "journal.log").read_text().splitlines()[before:]]
    assert [line["op_code"] for line in lines] == [4]
    assert set(lines[0]["params"]) == {"x", "k"}


def test_leases_tell_the_living_from_the_dead(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trimtab.tune.search.lease import Lease;"
        "print(Lease(Path(sys.argv[1])).worker, flush=True); time.sleep(60)"
    )
    own = Lease(tmp_path, "me")
    assert own.lives("me")
    assert not own.lives("nobody")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        other = process.stdout.readline().strip()
        assert own.lives(other)
        process.kill()
        process.wait()
        assert (tmp_path / f"{other}.lease").exists()
        assert not own.lives(other)
    own.close()
    assert not (tmp_path / "me.lease").exists()


def test_of_another_host_the_heartbeat_counts(tmp_path: Path) -> None:
    own = Lease(tmp_path, "me")
    path = tmp_path / "far.lease"
    path.write_text(json.dumps({"kernel": "another", "pid": 1}))
    assert own.lives("far")
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 120))
    assert not own.lives("far")
    own.close()
