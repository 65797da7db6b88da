from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.errors import RecordError, UsageError
from trimtab.record import Recorder
from trimtab.report import build_report

HOSTILE = "</script><img src=x onerror=alert(1)>\"'><svg onload=alert(2)>\u2028"


class Page(HTMLParser):
    """The page as a parser independent of trimtab sees it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[tuple[dict[str, str | None], str]]] = {"script": [], "style": []}
        self.text = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self._open = (tag, dict(attrs))
            self.inside[tag].append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            attrs, text = self.inside[self._open[0]][-1]
            self.inside[self._open[0]][-1] = (attrs, text + data)
        else:
            self.text += data

    @property
    def policy(self) -> dict[str, list[str]]:
        content = next(a["content"] for t, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert content is not None
        return {part.split()[0]: part.split()[1:] for part in content.split("; ")}

    @property
    def data(self) -> Any:
        return json.loads(next(text for attrs, text in self.inside["script"] if attrs.get("id") == "report-data"))


@pytest.fixture
def build(tmp_path: Path, run_folder: Path, sample: SimpleNamespace) -> Any:
    def make(*findings: dict[str, Any], **options: Any) -> Page:
        doctor = sample.FixedDoctor({run_folder.name: findings})
        out = build_report([run_folder], tmp_path / "report.html", doctor=doctor, **options)
        return Page(out.read_text(encoding="utf-8"))

    return make


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_exactly_the_pages_own_scripts_and_styles(build: Any) -> None:
    page = build()
    scripts = [text for attrs, text in page.inside["script"] if attrs.get("type") != "application/json"]
    assert len(scripts) == 2
    assert page.policy["script-src"] == [digest(text) for text in scripts]
    assert set(page.policy["style-src"]) == {digest(text) for _, text in page.inside["style"]} | {digest("")}
    assert page.policy["default-src"] == ["'none'"]
    assert page.policy["img-src"] == ["data:"]
    assert page.policy["base-uri"] == page.policy["form-action"] == ["'none'"]
    assert set(page.policy) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert "unsafe" not in str(page.policy)


def test_the_page_needs_nothing_from_outside(build: Any, sample: SimpleNamespace) -> None:
    page = build(sample.finding(), comparison=sample.comparison(), sweep=sample.sweep())
    for tag, attrs in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "form", "base")
        assert "src" not in attrs
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        if tag == "link":
            assert attrs == {"rel": "icon", "href": "data:,"}


def test_a_finding_stands_in_words_numbers_and_links(build: Any, sample: SimpleNamespace) -> None:
    page = build(sample.finding())
    for words in (
        "attention-logit-growth",
        "critical",
        "grew from 4.2 to 312",
        "312.5",
        "blocks.0.attention",
        "qk-norm",
    ):
        assert words in page.text
    assert "https://arxiv.org/abs/2309.14322" in [attrs.get("href") for _, attrs in page.tags]
    assert page.text.index("attention-logit-growth") < page.text.index("Drag over a chart")


def test_a_healthy_run_says_so(build: Any) -> None:
    assert "No finding" in build().text


def test_hostile_text_stays_text(tmp_path: Path, sample: SimpleNamespace) -> None:
    folder = tmp_path / "x<img src=x onerror=alert(3)>"
    with Recorder(folder) as recorder:
        recorder.meta("workload", HOSTILE)
        recorder.meta("config", {HOSTILE: HOSTILE})
        recorder.meta("environment", {"torch": HOSTILE})
        recorder.log(0, "loss", 1.0)
        recorder.log(0, HOSTILE, 1.0)
        recorder.log(0, "attention_max_logit", [1.0, 2.0], labels=[HOSTILE, f"{HOSTILE}/head1"])
        recorder.event(0, HOSTILE, HOSTILE)
    sign = sample.finding(
        name=HOSTILE,
        severity=HOSTILE,
        modules=[HOSTILE],
        cause=HOSTILE,
        remedies=[HOSTILE],
        citations=[HOSTILE, {"title": HOSTILE, "url": "javascript:alert(4)"}],
        evidence={"signal": "loss", HOSTILE: HOSTILE},
    )
    comparison, sweep = sample.comparison(), sample.sweep()
    comparison["workload"] = sweep["workload"] = comparison["metric"] = HOSTILE
    comparison["arms"][0]["label"] = sweep["curves"][0]["label"] = comparison["pairs"][0]["verdict"] = HOSTILE
    comparison["pairs"][0]["baseline"] = HOSTILE
    out = build_report(
        [folder],
        tmp_path / "report.html",
        comparison=comparison,
        sweep=sweep,
        title=HOSTILE,
        doctor=sample.FixedDoctor({folder.name: [sign]}),
    )
    page = Page(out.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "object"} == set()
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(not str(attrs.get("href", "")).startswith("javascript") for _, attrs in page.tags)
    assert page.text.count(HOSTILE) > 10
    assert any(line["name"] == HOSTILE for spec in page.data.values() for line in spec.get("lines", ()))


def test_every_chart_has_its_place_and_its_data(build: Any, sample: SimpleNamespace) -> None:
    page = build(sample.finding(), comparison=sample.comparison(), sweep=sample.sweep())
    places = [attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs]
    assert sorted(places) == sorted(page.data)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a" and attrs["href"].startswith("#")}
    assert targets <= set(ids)


def test_the_comparison_says_verdict_interval_and_divergence(build: Any, sample: SimpleNamespace) -> None:
    text = build(comparison=sample.comparison()).text
    for words in (
        "better",
        "no evidence",
        "\u22120.793, 95\u00a0% interval \u22120.9\u00a0to\u00a0\u22120.69, n\u00a0=\u00a03",
        "1 of 3",
        "2.44",
        "31",
    ):
        assert words in text


def test_runs_of_arms_have_the_colours_of_their_arms(tmp_path: Path, sample: SimpleNamespace) -> None:
    comparison = sample.comparison()
    folders = [sample.write_run(tmp_path / f"run{index}", steps=20, seed=index) for index in range(3)]
    for index, arm in enumerate(comparison["arms"]):
        arm["outcomes"][0]["folder"] = str(folders[2 - index])
    out = build_report(folders, tmp_path / "r.html", comparison=comparison, doctor=sample.FixedDoctor({}))
    lines = next(spec for spec in Page(out.read_text(encoding="utf-8")).data.values() if spec["kind"] == "curve")[
        "lines"
    ]
    assert {line["name"].split(":")[0]: line["tone"] for line in lines} == {"run0": 2, "run1": 1, "run2": 0}


def test_a_comparison_with_holes_is_still_shown(build: Any) -> None:
    comparison = {
        "workload": "w",
        "metric": "loss",
        "seeds": [0],
        "arms": [{"label": "a", "outcomes": []}, {"label": "b", "outcomes": [{"seed": 0, "loss": None}]}],
        "pairs": [
            {"arm": "b", "baseline": "a", "n": 1, "mean": None, "low": None, "high": None, "verdict": "no evidence"}
        ],
    }
    assert "interval unbounded, n\u00a0=\u00a01" in build(comparison=comparison).text


def test_the_sweep_says_its_sensitivity(build: Any, sample: SimpleNamespace) -> None:
    page = build(sweep=sample.sweep())
    curve = sample.sweep()["curves"][0]
    assert f"{curve['S']:.4g}" in page.text
    assert f"{curve['S_plus']:.4g}" in page.text
    # 7.0 is above the loss at initialisation: a blow-up is drawn where S counts it.
    assert page.data["chart-sweep"]["lines"][0]["mean"][-1] == 5.55


def test_the_same_input_gives_the_same_file(tmp_path: Path, run_folder: Path, sample: SimpleNamespace) -> None:
    doctor = sample.FixedDoctor({run_folder.name: [sample.finding()]})
    files = [
        build_report([run_folder], tmp_path / name, comparison=sample.comparison(), sweep=sample.sweep(), doctor=doctor)
        for name in ("a.html", "b.html")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path, sample: SimpleNamespace) -> None:
    folders = [sample.write_run(tmp_path / parent / "run", steps=20) for parent in ("first", "second")]
    text = Page(build_report(folders, tmp_path / "r.html", doctor=sample.FixedDoctor({})).read_text()).text
    assert "first/run" in text
    assert "second/run" in text


def test_the_real_doctor_examines_by_default(tmp_path: Path, run_folder: Path) -> None:
    assert build_report([run_folder], tmp_path / "r.html").stat().st_size > 1_000_000


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give at least one run"):
        build_report([], tmp_path / "r.html")


def test_a_folder_that_is_no_run_is_an_error_and_the_old_report_stays(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(RecordError, match="holds no run"):
        build_report([tmp_path / "none"], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "old"


@pytest.mark.parametrize("where", ["", "file/below/r.html"])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, sample: SimpleNamespace, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError) as caught:
        build_report([], tmp_path / where, sweep=sample.sweep())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("cannot write the report")


def test_a_failed_write_leaves_the_old_report_and_no_rest(
    tmp_path: Path, sample: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.html").write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="No space left on device"):
        build_report([], tmp_path / "r.html", sweep=sample.sweep())
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "old"


def test_page_scripts_never_write_html() -> None:
    source = (Path(build_report.__code__.co_filename).parent / "assets" / "report.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|XMLHttp", source)
