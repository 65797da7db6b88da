from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import RecordError, UsageError
from trimtab.record import checkpoint as module
from trimtab.record import latest_checkpoint, load_checkpoint, save_checkpoint
from trimtab.record.checkpoint import rng_state, set_rng_state, step_of

TENSORS = {
    "float32": torch.tensor([1.5, -0.0, math.inf, math.nan]),
    "float64": torch.tensor([[0.1, 1e-300]], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, 3.140625], dtype=torch.bfloat16),
    "float16": torch.tensor([65504.0], dtype=torch.float16),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int64": torch.tensor([2**62, -(2**62)]),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7.0),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "expanded": torch.ones(1).expand(4),
    "parameter": nn.Parameter(torch.ones(2)),
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit: NaN equals NaN, 0 does not equal -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return (
        left.detach().contiguous().numpy(force=True).tobytes() == right.numpy().tobytes()
        if (left.dtype != torch.bfloat16)
        else torch.equal(left.view(torch.int16), right.view(torch.int16))
    )


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_keeps_every_bit_its_dtype_and_shape(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 3, {"x": TENSORS[name]})
    step, state = load_checkpoint(tmp_path / "checkpoints" / "step-00000003")
    assert step == 3
    assert same(TENSORS[name], state["x"])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_plain_values_keep_type_order_and_value(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("plain")
    _, state = load_checkpoint(save_checkpoint(folder, 0, {"value": value}))
    # repr tells 1 from 1.0 and True, a tuple from a list, -0.0 from 0.0, keeps the order of keys, and NaN equals NaN.
    assert repr(state["value"]) == repr(value)


def test_tied_parameters_come_back_tied_through_load_state_dict(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embedding"].weight
        return model

    first, second = tied(), tied()
    path = save_checkpoint(tmp_path, 1, {"model": dict(first.state_dict())})
    second.load_state_dict(load_checkpoint(path)[1]["model"])
    assert second["head"].weight is second["embedding"].weight
    assert torch.equal(second["head"].weight, first["embedding"].weight)


def test_optimizer_state_survives(tmp_path: Path) -> None:
    def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = setup()
    step(model, optimizer)
    path = save_checkpoint(tmp_path, 1, {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    step(model, optimizer)
    other, other_optimizer = setup()
    _, state = load_checkpoint(path)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    step(other, other_optimizer)
    assert torch.equal(other.weight, model.weight)


def test_random_state_survives(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        path = save_checkpoint(tmp_path, 0, {"rng": rng_state()})
        expected = torch.rand(3)
        set_rng_state(load_checkpoint(path)[1]["rng"])
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "value", [{1.5: 0}, {True: 0}, {"x": object()}, {"x": {1, 2}}, {"x": torch.eye(2).to_sparse()}]
)
def test_refuses_in_one_line_what_it_cannot_hold(tmp_path: Path, value: dict[Any, Any]) -> None:
    with pytest.raises(RecordError, match="checkpoint") as caught:
        save_checkpoint(tmp_path, 0, {"state": value})
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (0, 0)])
def test_refuses_arguments_that_make_no_sense(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(UsageError):
        save_checkpoint(tmp_path, step, {}, keep=keep)


def test_keeps_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (2, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-100000000", "step-99999999"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert step_of(newest) == 100_000_000


def test_second_checkpoint_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"x": "other"})
    for value in range(3):
        save_checkpoint(tmp_path, 5, {"x": value})
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest) == (5, {"x": 2})
    assert step_of(newest) == 5
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("moment", ["save_file", "_sync", "_free_name", "_tidy"])
def test_a_death_at_any_moment_leaves_a_whole_checkpoint_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_checkpoint(tmp_path, 5, {"x": "old"})

    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, die)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 5, {"x": "new"})
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)[1]["x"] == ("new" if moment == "_tidy" else "old")
    save_checkpoint(tmp_path, 5, {"x": "third"})
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)[1]["x"] == "third"


def test_leftovers_of_killed_processes_are_cleared_when_old(tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    for name, age in ((".partial-00000001-1", 7200), (".trash-step-00000001-1", 7200), (".partial-00000002-2", 0)):
        (home / name).mkdir(parents=True)
        now = (home / name).stat().st_mtime
        os.utime(home / name, (now - age, now - age))
    save_checkpoint(tmp_path, 3, {})
    assert sorted(path.name for path in home.iterdir()) == [".partial-00000002-2", "step-00000003"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("length", [0, 5, -1])
def test_truncated_file_is_one_line(tmp_path: Path, file: str, length: int) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(100.0), "name": "value"})
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:length])
    with pytest.raises(RecordError, match="not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document", ["[]", "3", '{"step": 1}', '{"step": "x", "state": null}', '{"step": 1, "state": {"__tensor__": "t9"}}']
)
def test_damaged_state_is_one_line(tmp_path: Path, document: str) -> None:
    path = save_checkpoint(tmp_path, 1, {})
    (path / "state.json").write_text(document)
    with pytest.raises(RecordError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RecordError, match="cannot write a checkpoint"):
        save_checkpoint(tmp_path / "run", 0, {})
    assert (tmp_path / "run").read_text() == "a file"


def test_full_disk_loses_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"x": 1})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(RecordError, match="No space left"):
            save_checkpoint(tmp_path, 2, {"x": 2})
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest) == (1, {"x": 1})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("step-x", "step-", "step-1.partial"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({}))
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(RecordError, match="not a checkpoint"):
        step_of(tmp_path / "checkpoints" / "step-x")


def test_reading_imports_no_pickle_of_the_state(tmp_path: Path) -> None:
    """A checkpoint is safetensors and JSON: both files parse with those readers alone."""
    path = save_checkpoint(tmp_path, 1, {"x": torch.ones(2), "lr": 0.1})
    assert sorted(entry.name for entry in path.iterdir()) == ["state.json", "tensors.safetensors"]
    code = (
        "import json, sys, safetensors.numpy as numpy\n"
        "json.load(open(sys.argv[1] + '/state.json'))\n"
        "print(numpy.load_file(sys.argv[1] + '/tensors.safetensors')['t0'].sum())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2.0"
