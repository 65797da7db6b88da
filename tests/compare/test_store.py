"""Files of a comparison: whole or not at all, and never in place of someone else's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trimtab.compare.store import claimed, read_json, strict, write_json, write_results
from trimtab.errors import RecordError, UsageError


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read_json(path) == {"value": 1}
    write_json(path, {"value": 2})
    assert read_json(path) == {"value": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
        write_json(tmp_path / "file" / "result.json", {})


def test_results_are_strict_json_and_replace_only_their_own_kind(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_results(path, "sweep", {"ends": (-math.inf, [math.nan, 1.5])})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"kind": "sweep", "ends": [None, [None, 1.5]]}
    with pytest.raises(UsageError, match="is not a comparison"):
        write_results(path, "comparison", {})
    path.write_text("someone's notes")
    with pytest.raises(UsageError, match="is not a sweep"):
        write_results(path, "sweep", {})
    assert path.read_text() == "someone's notes"


def test_strict_leaves_plain_data_alone() -> None:
    data = {"a": [1, "x", None, True, {"b": 0.5}]}
    assert strict(data) == data


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(UsageError, match="another process"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass
