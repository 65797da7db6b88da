"""Every optimizer of the catalogue in a run: names, options, betas, modes, refusals and what it keeps."""

from __future__ import annotations

import inspect
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from trimtab.catalogue import _cards, method, methods
from trimtab.errors import UsageError
from trimtab.optim.adaptive.adamw import AdamW
from trimtab.optim.chain import Chain
from trimtab.record import Run, latest_checkpoint, load_checkpoint
from trimtab.workloads import Settings, Workload, parse_arm, session, train, workload
from trimtab.workloads.optimizers import arm_name, make_optimizer, optimizer_class, option_names, own_moments, runnable

DEFAULTS = Settings(lr=0.01, steps=100)
RUNNABLE = sorted(arm_name(card) for card in methods(room="optim") if runnable(card))


class Many(AdamW):
    """An option of every kind; the rest goes to AdamW and from there to the chain."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int = 4,
        scale: float = 1,
        fast: bool = False,
        mode: Literal["a", "b"] = "a",
        gap: int | None = None,
        warmup: int = 10,
        shape: tuple[int, ...] = (1, 2),
        **options: Any,
    ) -> None:
        self.got = {"rank": rank, "scale": scale, "fast": fast, "mode": mode, "gap": gap, "warmup": warmup}
        super().__init__(params, lr, **options)


class Own(torch.optim.Optimizer):
    """Betas of its own, three of them; a momentum; no weight decay; a required option."""

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        rank: int,
        betas: tuple[float, float, float] = (0.8, 0.7, 0.6),
        momentum: float = 0.5,
    ) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "betas": betas, "momentum": momentum})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: trains at y = 0.1 z + 0.9 x, is evaluated at the average x."""

    def __init__(self, params: Any, lr: float = 0.1, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "training": False, "count": 0})

    def _move(self, training: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["training"] is not training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["training"] = training

    def train(self) -> None:
        self._move(True, 0.1)

    def eval(self) -> None:
        self._move(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["training"], "a step outside training mode"
            group["count"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / 0.9)
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(x.lerp(z, 1 / group["count"]).lerp(z, 0.1))


class Closing(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> None: ...  # type: ignore[override]


class Losing(torch.optim.Optimizer):
    """Takes the loss, the length of the run and its seed, no learning rate."""

    def __init__(self, params: Any, *, num_steps: int, seed: int = 0) -> None:
        self.num_steps, self.seed, self.losses = num_steps, seed, []  # type: ignore[var-annotated]
        super().__init__(params, {})

    def step(self, closure: Any = None, *, loss: Tensor | None = None) -> None:  # type: ignore[override]
        assert loss is not None
        assert not loss.requires_grad
        self.losses.append(float(loss))


class Rule:
    def __init__(self, model: nn.Module) -> None: ...


class Wrapper(torch.optim.Optimizer):
    def __init__(self, params: Any, base: torch.optim.Optimizer) -> None: ...


Many.__init__.__annotations__["scale"] = "float"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards of this file's optimizers in the catalogue."""
    kinds = {
        "many": Many,
        "own": Own,
        "averaging": Averaging,
        "losing": Losing,
        "closing": Closing,
        "rule": Rule,
        "wrapper": Wrapper,
    }
    monkeypatch.setitem(sys.modules, "made_up_optimizers", SimpleNamespace(**kinds))  # type: ignore[arg-type]
    like = method("adamw")
    cards = {name: replace(like, name=name, entry=f"made_up_optimizers:{name}") for name in kinds}
    everything = {**_cards(), **cards}
    monkeypatch.setattr("trimtab.catalogue._cards", lambda: everything)


def weights(folder: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    return load_checkpoint(newest)[1]["model"]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def short(text: str, steps: int = 20) -> tuple[Workload, Settings]:
    job = workload("regression")
    job.evaluations = 4  # type: ignore[misc]
    return job, parse_arm(text, job.defaults).replace(steps=steps)


def interrupt_at(step: int) -> session.Progress:
    def progress(done: int, steps: int, loss: float) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_optimizer_of_the_catalogue_trains_and_resumes_in_a_run(name: str, tmp_path: Path) -> None:
    signature = inspect.signature(optimizer_class(name) or torch.optim.AdamW).parameters
    needed = [
        key for key in option_names(name) if key in signature and signature[key].default is inspect.Parameter.empty
    ]
    text = ",".join([name, "schedule=constant", "warmup=0", "weight_decay=0", *(f"{key}=1" for key in needed)])
    job, settings = short(text, steps=8)
    whole = train(job, settings)
    assert not whole.diverged
    assert math.isfinite(whole.loss)
    assert whole.loss != whole.initial_loss
    with pytest.raises(KeyboardInterrupt):
        train(job, settings, out=tmp_path, watch=False, progress=interrupt_at(4))
    assert train(job, settings, out=tmp_path, watch=False, resume=True).metrics == whole.metrics


def test_plain_names_are_torchs_and_the_prefix_reaches_ours() -> None:
    job, settings = short("adamw")
    assert type(make_optimizer(job.model(0), settings)) is torch.optim.AdamW
    ours = make_optimizer(job.model(0), settings.replace(optimizer="trimtab-adamw"))
    assert isinstance(ours, Chain)
    assert train(job, settings.replace(optimizer="trimtab-adamw")).loss == pytest.approx(
        train(job, settings).loss, rel=1e-5
    )


def test_parameters_come_in_groups_by_role_with_one_weight_decay() -> None:
    job, settings = short("trimtab-adamw,weight_decay=0.25")
    groups = make_optimizer(job.model(0), settings).param_groups
    assert {group["role"] for group in groups} == {"matrix", "head", "vector"}
    assert {group["weight_decay"] for group in groups} == {0.25}
    assert sum(len(group["params"]) for group in groups) == len(list(job.model(0).parameters()))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("many", {}),
        (
            "many,rank=8,scale=0.5,fast=true,mode=b,gap=3",
            {"rank": 8, "scale": 0.5, "fast": True, "mode": "b", "gap": 3},
        ),
        ("many,gap=none,scale=2,fast=False", {"gap": None, "scale": 2.0, "fast": False}),
        ("many,optimizer.warmup=3,warmup=0.5,eps=1e-3,state=bf16", {"warmup": 3, "eps": 1e-3, "state": "bf16"}),
    ],
)
@pytest.mark.usefixtures("made_up")
def test_options_have_the_types_of_the_signature_and_reach_it(text: str, options: dict[str, Any]) -> None:
    settings = parse_arm(text, DEFAULTS)
    assert dict(settings.options) == options
    assert [type(value) for _, value in settings.options] == [type(options[key]) for key, _ in settings.options]
    made = make_optimizer(nn.Linear(3, 2), settings)
    assert isinstance(made, Many)
    expected = {"rank": 4, "scale": 1, "fast": False, "mode": "a", "gap": None, "warmup": 10}
    assert made.got == {**expected, **{key: value for key, value in options.items() if key in expected}}
    assert made.defaults["eps"] == options.get("eps", 1e-8)
    assert made.defaults["state"] == options.get("state", "fp32")


@pytest.mark.usefixtures("made_up")
def test_options_survive_every_round_trip_and_tell_arms_apart() -> None:
    arm = parse_arm("many,rank=8,fast=true,lr=0.1", DEFAULTS)
    for mode in ("json", "python"):
        assert Settings(**arm.model_dump(mode=mode)) == arm  # type: ignore[arg-type]
    assert Settings.model_validate_json(arm.model_dump_json()) == arm
    assert arm.model_dump(mode="json")["options"] == {"fast": True, "rank": 8}
    assert hash(arm) == hash(Settings(**arm.model_dump()))
    assert arm.replace(rank=9) != arm
    assert dict(arm.replace(rank=9).options) == {"rank": 9, "fast": True}
    assert arm.replace(seed=3).options == arm.options
    assert arm.replace(optimizer="trimtab-adamw").options == ()
    assert dict(arm.replace(optimizer="trimtab-adamw", eps=1).options) == {"eps": 1.0}


def test_plain_settings_do_not_mention_what_came_later() -> None:
    later = {"options", "spikes", "spike_scale", "outliers", "schedule_options", "width", "depth"}
    assert set(DEFAULTS.model_dump(mode="json")) == set(Settings.model_fields) - later
    assert DEFAULTS.replace(spikes=0.1).model_dump()["spikes"] == 0.1


@pytest.mark.usefixtures("made_up")
def test_betas_and_momentum_are_the_methods_unless_they_are_adams() -> None:
    relative = parse_arm("many", DEFAULTS.replace(beta1=0.5, beta2=0.6))
    assert make_optimizer(nn.Linear(3, 2), relative).defaults["betas"] == (0.5, 0.6)
    own = parse_arm("own,rank=2,weight_decay=0", DEFAULTS)
    assert (own.beta1, own.beta2, own.momentum) == (0.8, 0.7, 0.5)
    assert own_moments("own") == {"beta1": 0.8, "beta2": 0.7, "momentum": 0.5}
    changed = parse_arm("own,rank=2,weight_decay=0,beta2=0.1,beta3=0.2,momentum=0.3", DEFAULTS)
    made = make_optimizer(nn.Linear(3, 2), changed)
    assert (made.defaults["betas"], made.defaults["momentum"]) == ((0.8, 0.1, 0.2), 0.3)
    assert (made.defaults["lr"], made.defaults["rank"]) == (0.01, 2)
    # Another step from the same optimizer keeps what was set.
    assert changed.replace(lr=0.5).beta2 == 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("many,rnk=3", "unknown setting 'rnk'. Did you mean 'rank'?"),
        ("many,rank=1.5", "rank of many should be int, got '1.5'"),
        ("many,rank=" + "1" * 5000, "rank of many should be int"),
        ("many,fast=1", "fast of many should be true or false, got '1'"),
        ("many,scale=nan", "scale of many should be float, got 'nan'"),
        ("many,gap=x", "gap of many should be None or int, got 'x'"),
        ("many,shape=1", "unknown setting 'shape'"),
        ("many,momentum=0.5", "momentum has no effect with many"),
        ("many,optimizer.rank=2,rank=3", "an option is given twice"),
        ("many,optimizer.lr=2", "unknown setting 'optimizer.lr'"),
        ("many,options=2", "unknown setting 'options'"),
        ("adamw,eps=1e-3", "unknown setting 'eps'"),
        ("own", "own needs rank: write it into the arm"),
        (
            "closing",
            "closing cannot be the optimizer of a run: it needs a closure at each step. Use made_up_optimizers",
        ),
        ("rule", "rule cannot be the optimizer of a run: it is not an optimizer class"),
        ("wrapper", "it needs 'base', which an arm cannot write"),
        ("manny", "unknown optimizer 'manny'. Did you mean 'many'?"),
        ("qk-norm", "qk-norm acts on the model, it is no optimizer: write with=qk-norm"),
        ("adamw,with=many", "many is an optimizer: name it first in the arm"),
    ],
)
@pytest.mark.usefixtures("made_up")
def test_what_an_arm_cannot_have_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arm(text, DEFAULTS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_the_optimizer_refuses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    job, settings = short("trimtab-adamw,state=9bit")
    with pytest.raises(UsageError, match="unknown state format '9bit'"):
        train(job, settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("made_up")
def test_weight_decay_that_an_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="own has no weight decay: write weight_decay=0"):
        make_optimizer(nn.Linear(2, 2), parse_arm("own,rank=2,weight_decay=0.1", DEFAULTS))


@pytest.mark.parametrize("arm", ["averaging", "many,state=bf16", "lion", "trimtab-adamw,spikes=0.3,outliers=0.1"])
@pytest.mark.usefixtures("made_up")
def test_resume_is_bit_exact(arm: str, tmp_path: Path) -> None:
    job, settings = short(arm)
    whole = train(job, settings, out=tmp_path / "whole", watch=False)
    for stop in (7, 13):
        with pytest.raises(KeyboardInterrupt):
            train(job, settings, out=tmp_path / "parts", watch=False, resume=stop > 7, progress=interrupt_at(stop))
    resumed = train(job, settings, out=tmp_path / "parts", watch=False, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert (resumed.metrics, resumed.mechanism) == (whole.metrics, whole.mechanism)
    again = train(job, settings, out=tmp_path / "parts", watch=False, resume=True)
    assert again.metrics == whole.metrics
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.usefixtures("made_up")
def test_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    job, settings = short("many,rank=8")
    train(job, settings, out=tmp_path, watch=False)
    for other in (settings.replace(rank=9), settings.replace(options={}), settings.replace(outliers=0.1)):
        with pytest.raises(UsageError, match=r"holds a run with other settings: (options|outliers) is"):
            train(job, other, out=tmp_path, watch=False, resume=True)


@pytest.mark.usefixtures("made_up")
def test_optimizers_with_two_modes_are_evaluated_and_saved_at_the_average(tmp_path: Path) -> None:
    job, settings = short("averaging,lr=0.1,schedule=constant,warmup=0,weight_decay=0,clip=0", steps=6)
    outcome = train(job, settings, out=tmp_path, watch=False, checkpoint_every=4)
    model = job.model(0)
    x = [p.detach().clone() for p in model.parameters()]
    z = [p.detach().clone() for p in model.parameters()]
    for step in range(6):
        with torch.no_grad():
            for p, one, other in zip(model.parameters(), x, z, strict=True):
                p.copy_(0.9 * one + 0.1 * other)
        inputs, targets = job.batch(0, step, settings.batch_size)
        gradients = torch.autograd.grad(job.loss(model(inputs), targets), list(model.parameters()))
        for place, gradient in enumerate(gradients):
            z[place] = z[place] - 0.1 * gradient
            x[place] = x[place] + (z[place] - x[place]) / (step + 1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), x, strict=True):
            p.copy_(value)
    assert outcome.loss == pytest.approx(job.evaluate(model)["loss"], rel=1e-5)
    for key, value in weights(tmp_path).items():
        assert torch.allclose(value, model.state_dict()[key], atol=1e-6)


@pytest.mark.usefixtures("made_up")
def test_evaluations_leave_training_alone(tmp_path: Path) -> None:
    job, settings = short("averaging,lr=1,warmup=0,spikes=0.5,spike_scale=50")
    train(job, settings, out=tmp_path / "often", watch=False, checkpoint_every=3)
    job.evaluations = 1  # type: ignore[misc]
    train(job, settings, out=tmp_path / "once", watch=False)
    assert same(weights(tmp_path / "often"), weights(tmp_path / "once"))


@pytest.mark.usefixtures("made_up")
def test_an_optimizer_may_take_the_loss_the_length_and_the_seed_of_the_run() -> None:
    job, settings = short("losing,weight_decay=0,seed=5", steps=3)
    run = session.Session(job, settings, {})
    seen = [run.step(None, None) for _ in range(2)]
    assert isinstance(run.optimizer, Losing)
    assert (run.optimizer.losses, run.optimizer.num_steps, run.optimizer.seed) == (seen, 3, 5)
    with pytest.raises(UsageError, match="lr has no effect with losing"):
        settings.replace(lr=0.5)


@pytest.mark.parametrize("watch", [True, False])
def test_a_gradient_that_the_optimizer_refuses_is_a_divergence(watch: bool, tmp_path: Path) -> None:
    job, settings = short("trimtab-adamw,spikes=1,spike_scale=1e300,clip=0,warmup=0")
    outcome = train(job, settings, out=tmp_path, watch=watch)
    assert (outcome.diverged, outcome.steps, outcome.loss) == (True, 0, outcome.initial_loss)
    assert same(weights(tmp_path), job.model(0).state_dict())
    with Run(tmp_path) as run:
        assert run.status == "diverged"
    allowed = train(job, settings.replace(nonfinite="skip"))
    assert (allowed.diverged, allowed.loss) == (False, allowed.initial_loss)


@pytest.mark.parametrize(
    ("arm", "bytes_"), [("adamw", 8), ("sgd", 4), ("sgd,momentum=0", 0), ("trimtab-adamw,state=bf16", 4), ("lion", 4)]
)
def test_state_bytes_per_parameter(arm: str, bytes_: float, tmp_path: Path) -> None:
    job, settings = short(arm, steps=2)
    mechanism = train(job, settings, out=tmp_path, watch=False).mechanism
    # torch's AdamW also keeps a step of four bytes for each tensor.
    assert mechanism["state_bytes_per_parameter"] == pytest.approx(bytes_, abs=0.05)


def test_options_are_listed_for_every_optimizer() -> None:
    assert {"state", "foreach", "compile", "nonfinite", "eps"} <= set(option_names("trimtab-adamw"))
    assert option_names("adamw") == []
