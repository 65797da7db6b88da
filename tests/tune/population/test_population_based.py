"""Population based training: its rules by hand, its decisions from what was seen, its folder shared by workers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.record import latest_checkpoint, load_checkpoint
from trimtab.tune import train_population
from trimtab.tune.population._exploit import (
    draw,
    exploit,
    explore,
    initial,
    perturbed,
    sample,
    t_test,
    tournament,
    truncation,
)
from trimtab.tune.population._members import Members
from trimtab.tune.population.population_based import CARD
from trimtab.tune.search.lease import Lease
from trimtab.tune.search.space import Range
from trimtab.workloads import train, workload

LR = Range(1e-5, 1e-1, log=True)
SPACE = {"lr": "1e-4:1e-1:log", "beta1": "0.5:0.95"}


def mlp(steps=40, **changes):
    return workload("digits-mlp").defaults.replace(schedule="constant", warmup=0.0, steps=steps, **changes)


def small(folder, **changes):
    options = {"settings": mlp(), "members": 5, "interval": 10, "workers": 0, **changes}
    return train_population("digits-mlp", options.pop("space", SPACE), folder=folder, **options)


def test_truncation_selection_by_hand():
    # Ten members, worst to best: 3, 7, 0, 9, 5, 1, 8, 2, 6, 4; the bottom 20 % are 3 and 7, the top 20 % are 4 and 6.
    order = [3, 7, 0, 9, 5, 1, 8, 2, 6, 4]
    fitness = {member: 0.1 * place for place, member in enumerate(order)}
    for member in range(10):
        chosen = {truncation(fitness, member, 0.2, u) for u in np.linspace(0, 0.999, 50)}
        assert chosen == ({4, 6} if member in (3, 7) else {None})
    counts = [truncation(fitness, 3, 0.2, u) for u in np.linspace(0, 0.9999, 1000)]
    assert counts.count(4) == counts.count(6) == 500


@pytest.mark.parametrize(
    ("members", "share", "count"), [(2, 0.2, 1), (3, 0.5, 1), (5, 0.2, 1), (6, 0.2, 2), (8, 0.2, 2)]
)
def test_share_of_a_small_population(members, share, count):
    fitness = {member: float(member) for member in range(members)}
    copying = [member for member in fitness if truncation(fitness, member, share, 0.5) is not None]
    assert copying == list(range(count))


def test_nobody_copies_alone_and_the_dead_are_not_copied():
    assert truncation({0: 1.0}, 0, 0.2, 0.5) is None
    dead = {0: -math.inf, 1: -math.inf, 2: -math.inf}
    assert truncation(dead, 2, 0.2, 0.5) is None
    # Three of four are dead: only two would be at the bottom, but no dead member can train on.
    recent = {0: [-math.inf], 1: [-math.inf], 2: [-math.inf], 3: [0.5]}
    for rule in ("truncation", "tournament", "t-test"):
        assert [exploit(rule, recent, member, 0.2, (0, member, 1)) for member in range(4)] == [3, 3, 3, None]


def test_tournament_by_hand():
    fitness = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.7}
    # The others of member 0 are 1, 2, 3, a third of [0, 1) each; 1 and 3 are better.
    assert [tournament(fitness, 0, u) for u in (0.1, 0.5, 0.9)] == [1, None, 3]
    assert {tournament(fitness, 1, u) for u in np.linspace(0, 0.99, 20)} == {None}


def test_t_test_is_welchs_on_the_last_ten():
    rng = np.random.default_rng(0)
    for case in range(60):
        mine, theirs = list(rng.normal(0, 3, 4 + 8 * (case % 2))), list(rng.normal(2.5, 0.5, 14))
        a, b = np.array(mine[-10:]), np.array(theirs[-10:])
        parts = [a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)]
        t = (b.mean() - a.mean()) / math.sqrt(sum(parts))
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
        # The density of Student's t integrated numerically, two-sided.
        grid = np.linspace(0, abs(t), 20001)
        density = (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
        density *= math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        p = 1 - 2 * np.trapezoid(density, grid)
        expected = 1 if t > 0 and p < 0.05 else None
        assert t_test({0: mine, 1: theirs}, 0, 0.3) == expected, case
        assert t_test({0: theirs, 1: mine}, 0, 0.3) == (1 if t < 0 and p < 0.05 else None), case
    assert t_test({0: [0.1], 1: [0.9]}, 0, 0.3) is None


def test_perturbation_by_hand():
    assert perturbed(0.01, LR, (0.8, 1.2), 0.49) == 0.01 * 0.8
    assert perturbed(0.01, LR, (0.8, 1.2), 0.5) == 0.01 * 1.2
    assert perturbed(0.09, LR, (0.8, 1.2), 0.5) == 0.1  # 0.108 is clipped
    assert perturbed(1.1e-5, LR, (0.8, 1.2), 0.0) == 1e-5
    assert perturbed(10, Range(4, 64, integer=True), (0.8, 1.2), 0.5) == 12
    assert perturbed(0.9, Range(0.5, 0.95), (0.8, 1.2), 0.5) == 0.95
    counts = [explore({"lr": 0.01}, {"lr": LR}, (0.8, 1.2), 0.0, (0, member, 1))["lr"] for member in range(2000)]
    assert set(counts) == {0.008, 0.012}
    assert abs(counts.count(0.008) - 1000) < 4 * math.sqrt(500)


def test_values_are_drawn_evenly_in_log_and_resampled_by_chance():
    values = np.log10([initial({"lr": LR}, (0, member, 0))["lr"] for member in range(2000)])
    counts = np.histogram(values, bins=4, range=(-5, -1))[0]
    assert np.all(np.abs(counts - 500) < 4 * math.sqrt(375))
    anew = [
        explore({"lr": 0.01}, {"lr": LR}, (0.8, 1.2), 0.25, (0, m, 1))["lr"] not in (0.008, 0.012) for m in range(2000)
    ]
    assert abs(sum(anew) - 500) < 4 * math.sqrt(375)
    assert {sample(Range(1, 3, integer=True), u) for u in np.linspace(0, 0.999, 99)} == {1, 2, 3}


@given(
    low=st.floats(1e-9, 1.0),
    ratio=st.floats(1.001, 1e9),
    log=st.booleans(),
    integer=st.booleans(),
    factors=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    resample=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_values_stay_in_range(low, ratio, log, integer, factors, resample, seed):
    dimension = (
        Range(math.ceil(low), math.ceil(low) + math.ceil(ratio), log, True) if integer else Range(low, low * ratio, log)
    )
    values = initial({"x": dimension}, (seed, 0, 0))
    for interval in range(20):
        assert dimension.low <= values["x"] <= dimension.high
        assert not integer or values["x"] == int(values["x"])
        values = explore(values, {"x": dimension}, factors, resample, (seed, 0, interval))


def _toy(exploits, explores, seed):
    """Two members, 49 intervals of 4 steps; the best Q at the end."""
    theta = {0: np.array([0.9, 0.9]), 1: np.array([0.9, 0.9])}
    h = {0: {"a": 1.0, "b": 0.0}, 1: {"a": 0.0, "b": 1.0}}
    space = {"a": Range(0.0, 1.0), "b": Range(0.0, 1.0)}
    for interval in range(1, 50):
        for member in (0, 1):
            slope = 2 * np.array([h[member]["a"], h[member]["b"]])
            for _ in range(4):
                theta[member] = theta[member] - 0.005 * slope * theta[member]
            scores = {m: [1.2 - float(theta[m] @ theta[m])] for m in (0, 1)}
            donor = exploit("truncation", scores, member, 0.2, (seed, member, interval)) if exploits else member
            if donor is None:
                continue
            theta[member] = theta[donor].copy()
            if explores:
                h[member] = explore(h[donor], space, (0.8, 1.2), 0.25, (seed, member, interval))
    return max(1.2 - float(value @ value) for value in theta.values())


def test_toy_problem_of_the_paper():
    """Figure 2: maximise Q = 1.2 - |θ|^2 by climbing 1.2 - h_0 θ_0^2 - h_1 θ_1^2, from h = (1, 0) and (0, 1).

    With its own h no member leaves one of the coordinates; exploit and explore together come nearest to the top.
    """
    neither, exploits, explores, both = (
        float(np.median([_toy(*arm, seed) for seed in range(40)]))
        for arm in ((False, False), (True, False), (False, True), (True, True))
    )
    assert neither == pytest.approx(1.2 - 0.81 - 0.81 * 0.99 ** (2 * 196), abs=1e-12)
    assert neither + 0.5 < exploits < explores < both - 0.1


def test_lone_lineage_is_plain_training(tmp_path):
    """A member that nobody overwrites trains bit for bit as `train` does with its values."""
    space = {"lr": Range(1e-3, 1.0001e-3)}
    found = small(tmp_path / "pbt", space=space, members=2, exploit="t-test", settings=mlp(seed=3))
    known = found.records[1]
    assert [record["action"] for record in known] == ["start", "continue", "continue", "continue"]
    outcome = train("digits-mlp", mlp(seed=4, lr=known[0]["hyperparameters"]["lr"]), out=tmp_path / "run")
    assert [record["step"] for record in known] == [10, 20, 30, 40]
    assert known[-1]["metrics"] == outcome.metrics
    final = load_checkpoint(latest_checkpoint(tmp_path / "run"))[1]["model"]
    mine = load_checkpoint(latest_checkpoint(tmp_path / "pbt" / known[-1]["checkpoint"]))[1]["model"]
    assert all(torch.equal(mine[name], value) for name, value in final.items())


def test_decisions_follow_from_what_was_seen(tmp_path):
    found = small(tmp_path)
    exploits = 0
    for member, known in enumerate(found.records):
        for record in known[1:]:
            path = tmp_path / "members" / f"{member:03d}" / f"{record['interval']:05d}.decision.json"
            decision = json.loads(path.read_text())
            losses = {int(other): -values[-1] for other, values in decision["seen"].items()}
            ranked = sorted(losses, key=lambda other: (losses[other], other))
            assert losses[member] == known[record["interval"] - 1]["score"]
            if member != ranked[-1]:
                assert (record["action"], record["parent"]) == ("continue", [member, record["interval"] - 1])
                assert record["hyperparameters"] == known[record["interval"] - 1]["hyperparameters"]
                continue
            exploits += 1
            donor, at = record["parent"]
            assert (record["action"], donor) == ("exploit", ranked[0])
            copied = found.records[donor][at]["hyperparameters"]
            for name, value in record["hyperparameters"].items():
                low, high = (1e-4, 1e-1) if name == "lr" else (0.5, 0.95)
                assert value in [min(max(copied[name] * factor, low), high) for factor in (0.8, 1.2)]
    assert exploits >= 3


def test_copied_state_is_the_donors_with_new_values(tmp_path):
    found = small(tmp_path, synchronous=True)
    record = next(record for known in found.records for record in known[1:] if record["action"] == "exploit")
    donor, at = record["parent"]
    step, state = load_checkpoint(latest_checkpoint(tmp_path / found.records[donor][at]["checkpoint"]))
    # The interval by hand: torch's own AdamW from the donor's state, with the values on record.
    job = workload("digits-mlp")
    model = job.model(0)
    model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    values = record["hyperparameters"]
    optimizer.param_groups[0].update(lr=values["lr"], betas=(values["beta1"], mlp().beta2))
    for place in range(step, step + 10):
        inputs, targets = job.batch(record["member"], place, mlp().batch_size)
        optimizer.zero_grad()
        job.loss(model(inputs), targets).backward()
        if mlp().clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), mlp().clip)
        optimizer.step()
    assert job.evaluate(model) == record["metrics"]


@pytest.mark.parametrize("synchronous", [False, True])
def test_one_worker_is_a_pure_function_and_a_second_call_trains_nothing(tmp_path, synchronous):
    one = small(tmp_path / "one", synchronous=synchronous)
    two = small(tmp_path / "two", synchronous=synchronous)
    assert one.to_json() == two.to_json()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "members").rglob("0*.json")}
    assert small(tmp_path / "one", synchronous=synchronous).to_json() == one.to_json()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "members").rglob("0*.json")} == times
    assert json.loads((tmp_path / "one" / "population.json").read_text())["best"]["score"] == min(
        known[-1]["score"] for known in one.records
    )


def test_schedule_is_traced_through_the_ancestors(tmp_path):
    found = small(tmp_path)
    for member in range(5):
        rows = found.schedule(member)
        assert rows[0]["first"] == 0
        assert all(after["first"] == before["last"] for before, after in itertools.pairwise(rows))
        assert rows[-1]["hyperparameters"] == found.records[member][-1]["hyperparameters"]
    assert any(len({row["member"] for row in found.schedule(member)}) > 1 for member in range(5))


def test_diverged_members_copy_and_only_recent_checkpoints_are_kept(tmp_path):
    space = {"lr": "1e-2:1e12:log"}
    settings = mlp(steps=60).replace(optimizer="sgd", momentum=0.0)
    found = small(tmp_path, space=space, settings=settings, interval=5)
    records = [record for known in found.records for record in known]
    assert len(records) == 5 * 12
    dead = [record for record in records if record["diverged"]]
    assert dead
    assert all(record["score"] is None and record["checkpoint"] is None for record in dead)
    for record in dead[:-1]:
        after = found.records[record["member"]][record["interval"] + 1 :][:1]
        assert all(following["action"] in ("exploit", "restart") for following in after)
    for member in range(5):
        assert len(list((tmp_path / "members" / f"{member:03d}").glob("?????-*"))) <= 5
    assert not list((tmp_path / "claims").iterdir())
    assert not list((tmp_path / "leases").iterdir())


def test_a_living_claim_holds_and_a_dead_one_is_taken_over_once(tmp_path):
    store = Members(tmp_path, 2, 3, synchronous=False)
    first, second, third = (Lease(tmp_path / "leases", name) for name in ("first", "second", "third"))
    assert store.claim(0, 0, first)
    assert not store.claim(0, 0, second)
    first.close()
    assert store.claim(0, 0, second)
    assert not store.claim(0, 0, third)
    assert store.finish(0, 0, {"checkpoint": None, "by": "second"})
    assert not store.finish(0, 0, {"checkpoint": None, "by": "third"})
    assert store.records(0)[0]["by"] == "second"
    assert not store.claim(0, 0, third)
    assert not list((tmp_path / "claims").iterdir())
    second.close()
    third.close()


def test_synchronous_members_wait(tmp_path):
    store = Members(tmp_path, 2, 3, synchronous=True)
    store.finish(0, 0, {"checkpoint": None})
    assert store.open() == [(1, 0)]
    free = Members(tmp_path, 2, 3, synchronous=False)
    free.refresh()
    assert free.open() == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"members": 1}, "members must be a whole number from 2 to 999, got 1"),
        ({"interval": 41}, "interval must be a whole number from 1 to 40, got 41"),
        ({"interval": 0}, "interval must be"),
        ({"exploit": "best"}, "unknown exploit rule 'best'"),
        ({"share": 0.6}, "share must be in"),
        ({"factors": (0.0,)}, "factors must be above 0"),
        ({"resample": 2}, "resample must be a probability"),
        ({"metric": "los"}, "Did you mean 'loss'"),
        ({"space": {}}, "at least one range"),
        ({"space": {"seed": "0:10"}}, "seed cannot change during a run"),
        ({"space": {"beta1": "0.5:1.5"}}, "beta1"),
        ({"space": {"momentum": "0.5:0.9"}}, "momentum has no effect with adamw"),
        ({"space": {"optimizer": "adamw,lion"}}, "should be a range"),
        ({"space": {"lrr": "1e-4:1e-1"}}, "lrr"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, changes, text):
    with pytest.raises(UsageError, match=text) as caught:
        small(tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_plan_is_refused(tmp_path):
    small(tmp_path, members=2, interval=40)
    with pytest.raises(UsageError, match="interval is 40 there and 20 here"):
        small(tmp_path, members=2, interval=20)


def test_options_of_an_optimizer_and_whole_numbers(tmp_path):
    space = {"lr": "1e-4:1e-2:log", "eps": "1e-10:1e-4:log", "batch_size": "8:64:int"}
    settings = mlp(steps=20).replace(optimizer="trimtab-adamw")
    found = small(tmp_path, space=space, settings=settings, exploit="tournament", resample=0.5)
    values = [record["hyperparameters"] for known in found.records for record in known]
    assert all(isinstance(value["batch_size"], int) and 8 <= value["batch_size"] <= 64 for value in values)
    assert len({value["eps"] for value in values}) >= 5


def test_two_processes_share_a_folder(tmp_path):
    found = small(tmp_path / "two", synchronous=True, workers=2)
    assert len({record["worker"] for known in found.records for record in known}) == 2
    assert found.to_json() == small(tmp_path / "one", synchronous=True).to_json()
    assert not list((tmp_path / "two" / "workers").iterdir())


def test_defaults_of_the_card_and_draws_are_keyed():
    assert {default.name: default.value for default in CARD.defaults}["share"] == 0.2
    values = [draw(seed, member, "x") for seed in range(30) for member in range(30)]
    assert len(set(values)) == 900
    assert abs(np.mean(values) - 0.5) < 4 * math.sqrt(1 / 12 / 900)
