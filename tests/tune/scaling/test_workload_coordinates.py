"""The coordinate check on a workload: its batches and base, jobs that are kept, and the file it writes."""

from __future__ import annotations

import json

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.layers import apply_mup, mup_param_groups
from trimtab.tune import workload_coordinate_check
from trimtab.workloads import workload


def test_equals_a_plain_loop_and_keeps_what_is_finished(tmp_path):
    options = {
        "widths": (128, 16, 32),
        "steps": 2,
        "seeds": 1,
        "lr": 0.02,
        "batch_size": 8,
        "folder": tmp_path,
        "workers": 1,
    }
    found = workload_coordinate_check("digits-mlp", parametrizations=("mup", "standard"), **options)
    job = workload("digits-mlp")
    model = job.model(0, width=32)
    with torch.device("meta"):
        apply_mup(model, job.model(0))
    optimizer = torch.optim.Adam(mup_param_groups(model, lr=0.02), lr=0.02)
    inputs, targets = job.batch(0, 0, 8)
    start = model(inputs).detach()
    for step in range(2):
        optimizer.zero_grad()
        inputs, targets = job.batch(0, step, 8)
        job.loss(model(inputs), targets).backward()
        optimizer.step()
    change = (model(job.batch(0, 0, 8)[0]).detach() - start).abs().mean()
    head = found["mup"].modules[-1]
    assert found["mup"].widths == (16, 32, 128)
    assert head.changes[0][1][2] == pytest.approx(float(change), rel=1e-4)
    # At the workload's own width there is nothing to tell them apart.
    assert found["standard"].modules[-1].changes[0][2] == head.changes[0][2]

    written = json.loads((tmp_path / "coord-check.json").read_text(), parse_constant=pytest.fail)
    assert (written["kind"], written["workload"], written["lr"]) == ("coord-check", "digits-mlp", 0.02)
    assert [check["parametrization"] for check in written["checks"]] == ["mup", "standard"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    assert len(times) == 6
    again = workload_coordinate_check("digits-mlp", parametrizations=("mup",), **options)
    assert again == {"mup": found["mup"]}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")} == times


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("digits-mlb", {}, "Did you mean 'digits-mlp'"),
        ("digits-mlp", {"widths": (8, 16)}, "three or more"),
        ("digits-mlp", {"parametrizations": ("ntk",)}, "unknown parametrization"),
        ("digits-mlp", {"optimizer": "lion"}, "unknown kind of optimizer"),
        ("digits-mlp", {"lr": 0.0}, "lr must be above 0"),
        ("digits-mlp", {"batch_size": 10**6}, "exceeds the"),
        ("digits-vit", {"widths": (30, 32, 64)}, "width"),
        ("digits-mlp", {"text": "here"}, "takes no text"),
    ],
)
def test_wrong_use_is_one_line_and_starts_nothing(tmp_path, name, options, text):
    with pytest.raises(UsageError, match=text) as caught:
        workload_coordinate_check(name, **{"widths": (8, 16, 32), "folder": tmp_path / "out", **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
