"""The chain's own rules: options, parts, totals, refreshes, pieces, checkpoints, bad gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trimtab.errors import RunFailedError, UsageError
from trimtab.optim import SPAM, AdamW, Chain, RAdam, Ranger21, ScheduleFreeSGD, SGD8bit, adam
from trimtab.optim.transform import Transform
from trimtab.testing import run_ranks


class plus(Transform):
    """u + amount, with a count of its updates as state."""

    def __init__(self, amount=1.0, name="amount"):
        super().__init__(**{name: amount})
        self.name = name

    def init(self, p, group):
        return {self.name + "_seen": torch.zeros_like(p)}

    def coefficients(self, step, group):
        return {"amount": float(group[self.name])}

    def update(self, u, p, state, h):
        state[self.name + "_seen"].add_(1)
        return u + h["amount"]


class share(Transform):
    """u divided by the sum of all entries of all updates."""

    sums = True

    def total(self, u, p, state, h):
        return u.sum()

    def update(self, u, p, state, h):
        return u / h["total"]


class reset(Transform):
    """u + noise, with noise drawn anew every third step."""

    def init(self, p, group):
        return {"noise": torch.zeros_like(p)}

    def due(self, step, group):
        return step % 3 == 1

    def refresh(self, u, p, state, step, group, generator):
        state["noise"].copy_(torch.randn(p.shape, generator=generator))

    def update(self, u, p, state, h):
        return u + state["noise"]


PATHS = [{"foreach": False}, {}, {"compile": True}]
quiet = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def _params(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return params


@quiet
@pytest.mark.parametrize("options", PATHS, ids=["plain", "foreach", "compiled"])
def test_transforms_apply_in_order_and_the_chain_descends(options):
    class double(Transform):
        def update(self, u, p, state, h):
            return u * 2

    (p,) = _params((3, 4))
    start, grad = p.detach().clone(), p.grad.clone()
    Chain([p], [plus(0.5), double()], lr=0.1, weight_decay=0.3, **options).step()
    torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.3) - 0.1 * 2 * (grad + 0.5))


@quiet
@pytest.mark.parametrize("options", PATHS, ids=["plain", "foreach", "compiled"])
def test_totals_run_over_all_groups_after_what_comes_before(options):
    params = _params((3, 4), (5,), ())
    start, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    Chain(groups, [plus(1.0), share()], lr=0.1, **options).step()
    total = sum((grad + 1).sum() for grad in grads)
    for p, old, grad, lr in zip(params, start, grads, (0.1, 0.5, 0.5), strict=True):
        torch.testing.assert_close(p.detach(), old - lr * (grad + 1) / total)


def test_totals_run_over_all_ranks():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        Chain(model.parameters(), [share()], lr=1.0).step()
        return [p.full_tensor().detach() for p in model.parameters()]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    model(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
    total = sum(p.grad.sum() for p in model.parameters())
    for values in run_ranks(work):
        for value, p in zip(values, model.parameters(), strict=True):
            torch.testing.assert_close(value, p.detach() - p.grad / total)


@pytest.mark.parametrize("options", PATHS[:2], ids=["plain", "foreach"])
def test_refresh_happens_when_due_from_a_generator_of_its_own(options):
    params = _params((2, 3), (4,))
    optimizer = Chain(params, [reset()], lr=1.0, **options)
    seen = []
    for _ in range(4):
        optimizer.step()
        seen.append([optimizer.state[p]["noise"].clone() for p in params])
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[2][0], seen[3][0])
    assert not torch.equal(seen[0][0].flatten()[:4], seen[0][1])
    expected = torch.randn(2, 3, generator=optimizer.generator(0, 4))
    assert torch.equal(seen[3][0], expected)


def test_a_parameter_without_a_gradient_at_a_boundary_refreshes_at_its_own_step():
    one, two = _params((2,), (2,))
    optimizer = Chain([one, two], [reset()], lr=1.0)
    two.grad = None
    optimizer.step()
    assert two not in optimizer.state
    two.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[one]["step"] == 2
    assert optimizer.state[two]["step"] == 1
    assert (optimizer.state[two]["noise"] != 0).all()


@pytest.mark.parametrize("shape", [(300, 301), (70000,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pieces_are_the_whole(shape, dtype):
    pieces, whole = _params(shape, (7,), (), dtype=dtype), _params(shape, (7,), (), dtype=dtype)
    one, two = AdamW(pieces, lr=0.1), AdamW(whole, lr=0.1, foreach=False)
    for _ in range(3):
        one.step()
        two.step()
    for p, q in zip(pieces, whole, strict=True):
        assert torch.equal(p, q)


def test_transposed_parameters_and_gradients():
    (p,) = _params((300, 200))
    q = nn.Parameter(p.detach().clone().T.contiguous().T)
    q.grad = p.grad.clone()
    assert not q.is_contiguous()
    p.grad = p.grad.T.contiguous().T
    for parameter in (p, q):
        AdamW([parameter], lr=0.1).step()
    assert torch.equal(p, q)


@quiet
def test_a_new_learning_rate_or_step_compiles_nothing():
    from torch._dynamo.utils import counters

    params = _params((4, 4), (3,))
    optimizer = AdamW(params, compile=True)
    optimizer.step()
    before = counters["stats"]["unique_graphs"]
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == before
    assert len(optimizer._compiled) == 1


def test_gradients_of_huge_finite_entries_pass_and_are_not_taken_for_infinite():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 1e30)
    Chain([p], [], lr=1e-30).step()
    torch.testing.assert_close(p.detach(), torch.zeros(4))


def test_a_non_finite_gradient_is_named_before_anything_moves():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunFailedError, match=r"gradient of parameter '1.weight', shape \(1, 2\), has NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.state_dict()["state"] == {}


def test_skipped_steps_are_counted_and_allowed_ones_are_taken():
    (p,) = _params((3,))
    p.grad[0] = float("nan")
    skipping = AdamW([p], nonfinite="skip")
    skipping.step()
    assert skipping.skipped_steps == 1
    assert p.isfinite().all()
    AdamW([p], nonfinite="allow").step()
    assert p.isnan().any()


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = AdamW(model.parameters(), nonfinite="skip")
        model(torch.ones(2, 4)).sum().backward()
        if rank == 1:
            model.weight.grad.to_local()[0, 0] = float("nan")
        optimizer.step()
        return optimizer.skipped_steps

    assert run_ranks(work) == [1, 1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: Chain([p], [adam(), adam()]), "two stages of the chain have an option 'betas'"),
        (lambda p: Chain([p], [adam]), "a chain is made of transforms, got type"),
        (lambda p: Chain([p], [adam()], state="fp8"), "unknown state format 'fp8'"),
        (lambda p: Chain([p], [adam()], nonfinite="ignore"), "unknown policy for non-finite gradients 'ignore'"),
        (lambda p: Chain([p], [adam()], weight_decay=-0.1), r"weight_decay must be in \[0, inf\), got -0.1"),
        (lambda p: AdamW([p], betas=(0.9, 1.0)), r"betas must be in \[0, 1\), got 1.0"),
        (lambda p: AdamW([p], betas=0.9), "betas must be 2 numbers"),
        (lambda p: AdamW([p], lr=float("nan")), "lr must be in"),
        (lambda p: AdamW([p], lr="0.1"), r"lr must be in \[0, inf\), got '0.1'"),
        (lambda p: AdamW([p], lr=None), "lr must be in"),
        (lambda p: AdamW([p], lr=torch.ones(2)), "lr must be in"),
        (lambda p: AdamW([p], maximize="no"), "maximize must be True or False, got 'no'"),
        (lambda p: AdamW([p], foreach=None), "foreach must be True or False"),
        (lambda p: AdamW([p], compile=1), "compile must be True or False"),
        (lambda p: AdamW([p], seed=0.5), "seed must be a whole number, got 0.5"),
        (lambda p: SPAM([p], interval=2.5), "interval must be a whole number, at least 0, got 2.5"),
        (lambda p: SPAM([p], warmup=2.5), "warmup must be a whole number"),
        (lambda p: SPAM([p], clip_after=1), "clip_after must be a whole number, at least 2"),
        (lambda p: ScheduleFreeSGD([p], warmup_steps=0.1), "warmup_steps must be a whole number"),
        (lambda p: Ranger21([p], total_steps=1e4), "total_steps must be a whole number"),
        (lambda p: Ranger21([p], lookahead_steps=True), "lookahead_steps must be a whole number"),
        (lambda p: Ranger21([p], positive_negative="no"), "positive_negative must be True or False"),
        (lambda p: Ranger21([p], normalize=1), "normalize must be True or False"),
        (lambda p: RAdam([p], degenerated_to_sgd=0), "degenerated_to_sgd must be True or False"),
        (lambda p: SGD8bit([p], nesterov=1), "nesterov must be True or False"),
        (lambda p: AdamW([{"params": [p], "weigth_decay": 0.1}]), "Did you mean 'weight_decay'"),
        (lambda p: Chain([p], [plus(name="a"), plus(name="lr")]), "an option 'lr'"),
    ],
)
def test_wrong_use_is_one_line(make, text):
    with pytest.raises(UsageError, match=text) as caught:
        make(nn.Parameter(torch.ones(2)))
    assert "\n" not in str(caught.value)


def test_loading_names_what_does_not_fit_and_changes_nothing():
    (p,) = _params((3, 2))
    optimizer = AdamW([p])
    optimizer.step()
    for change, text in [
        (lambda state: state.pop("exp_avg"), "has no 'exp_avg'"),
        (lambda state: state.update(momentum=torch.ones(3, 2)), "has 'momentum', which this optimizer does not keep"),
        (
            lambda state: state.update(exp_avg=torch.ones(3, 3)),
            r"has shape \(3, 3\), but this optimizer needs \(3, 2\)",
        ),
    ]:
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][0])
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(UsageError, match=text):
            optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[p]["exp_avg"], before["state"][0]["exp_avg"])
    for change, text in [
        (lambda saved: saved["state"][0].update(exp_avg=1.0), "exp_avg of parameter 0 is float, but must be a tensor"),
        (lambda saved: saved["state"].update({7: {}}), "a state of parameter 7, which none of its groups has"),
        (lambda saved: saved["param_groups"][0].update(betas=(2.0, 0.9)), r"betas must be in \[0, 1\), got 2.0"),
    ]:
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        with pytest.raises(UsageError, match=text):
            optimizer.load_state_dict(saved)
    with pytest.raises(UsageError, match="no 'param_groups'"):
        optimizer.load_state_dict({"state": {}})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_loading_leaves_the_callers_dict_alone_and_shares_nothing_with_it():
    (p,) = _params((3, 2))
    optimizer = AdamW([p])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdamW([p])
    other.load_state_dict(saved)
    other.step()
    assert torch.equal(saved["state"][0]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_hooks_on_loading_see_and_change_the_state_dict():
    (p,) = _params((2,))
    optimizer = AdamW([p])
    optimizer.step()
    other = AdamW([p])
    calls = []

    def double(_, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["exp_avg"] *= 2
        return changed

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.state[p]["exp_avg"], 2 * optimizer.state[p]["exp_avg"])
    assert calls == ["after"]


def test_torchs_adamw_checkpoint_goes_on_in_ours():
    (p,), (q,) = _params((3, 2)), _params((3, 2))
    theirs = torch.optim.AdamW([p], lr=0.1)
    for _ in range(3):
        theirs.step()
    ours = AdamW([q], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    q.data.copy_(p.data)
    theirs.step()
    ours.step()
    torch.testing.assert_close(q, p)
    assert ours.param_groups[0]["state"] == "fp32"


def test_groups_and_parameters_choose_their_own_format():
    big, kept, small = _params((80, 80), (80, 80), (8, 8))
    kept.optim_state = "fp32"
    (embedding,) = _params((80, 80))
    groups = [{"params": [big, small], "state": "8bit"}, {"params": [kept], "state": "8bit-2048"}]
    optimizer = AdamW([*groups, {"params": [embedding], "state": "8bit", "role": "embedding"}])
    optimizer.step()
    assert optimizer.state[embedding]["exp_avg"].dtype == torch.float32
    assert optimizer.state[big]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[kept]["exp_avg"].dtype == torch.float32
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("made", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_model_that_is_cast_goes_on_with_its_state(made, used):
    model = nn.Linear(3, 2).to(made)
    optimizer = AdamW(model.parameters())
    for dtype in (made, used):
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    other = AdamW(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    other.step()
    # Of gradients of 1: (1 - beta^t) whatever the dtype.
    kept = other.state[model.weight]["exp_avg"]
    assert kept.dtype == torch.promote_types(used, torch.float32)
    torch.testing.assert_close(kept, torch.full_like(kept, 1 - 0.9**3))


@pytest.mark.parametrize("before", ["fp32", "bf16", "8bit", "8bit-2048"])
@pytest.mark.parametrize("after", ["fp32", "bf16", "8bit", "8bit-2048"])
def test_state_follows_a_change_of_its_format(before, after):
    p, q = nn.Parameter(torch.ones(80, 80)), nn.Parameter(torch.ones(80, 80))
    optimizer, fresh = AdamW([p], state=before), AdamW([q], state=after)
    p.grad = q.grad = torch.ones(80, 80)
    optimizer.step()
    fresh.step()
    optimizer.param_groups[0]["state"] = after
    optimizer.step()
    fresh.step()
    layouts = [
        {n: (v.shape, v.dtype) for n, v in one.items() if n != "step"} for one in (optimizer.state[p], fresh.state[q])
    ]
    assert layouts[0] == layouts[1]
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("own", "of_group"), [("8bit", "fp32"), ("fp32", "8bit")])
def test_a_copy_whose_parameters_lost_their_attribute_goes_on(own, of_group):
    model = nn.Linear(80, 80)
    model.weight.optim_state = own  # copies of parameters have no attributes
    optimizer = AdamW(model.parameters(), state=of_group)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    optimizer.step()
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    twin.step()
    torch.testing.assert_close(other.weight, model.weight)


def test_a_copy_made_after_a_scheduler_steps_its_own_parameters():
    (p,) = _params((3,))
    optimizer = AdamW([p])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # it wraps optimizer.step
    q, twin = copy.deepcopy((p, optimizer))
    q.grad = torch.ones(3)
    before = p.detach().clone()
    twin.step()
    assert torch.equal(p, before)
    assert (q != before).all()


def test_a_huge_gradient_leaves_the_rest_of_an_8_bit_block_alone():
    p, q = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    optimizer, calm = AdamW([p], state="8bit"), AdamW([q], state="8bit")
    for step in range(4):
        p.grad, q.grad = torch.ones(64, 64), torch.ones(64, 64)
        if step == 1:
            p.grad[0, 0] = 1e25  # its square is infinite in float32
        optimizer.step()
        calm.step()
    assert p.isfinite().all()
    assert torch.equal(p[4:], q[4:])


def test_gradients_that_do_not_fit_are_named():
    (p,) = _params((4,))
    p.data = torch.ones(5)
    with pytest.raises(
        UsageError, match=r"gradient of parameter 0 of group 0 is \(4,\) torch.float32 on cpu, but must"
    ):
        AdamW([p]).step()
