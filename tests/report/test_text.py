from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

from hypothesis import example, given
from hypothesis import strategies as st

from trimtab.report.text import citation, esc, json_block, link, number

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028&amp;\"'"


class Collector(HTMLParser):
    """An independent reading of HTML: the tags and the text that it holds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Collector:
    collector = Collector()
    collector.feed(html)
    collector.close()
    return collector


@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])))
@example(HOSTILE)
def test_escaped_text_is_read_back_as_text(text: str) -> None:
    seen = read(f'<p title="{esc(text)}">{esc(text)}</p>')
    assert seen.tags == ["p"]
    assert seen.text == text


@given(st.text())
@example(HOSTILE)
@example("<!--<script>")
def test_a_json_block_is_one_script_that_gives_its_data_back(text: str) -> None:
    block = json_block("data", {"name": text, text: [1.5, math.inf]})
    inner = re.fullmatch(r'<script type="application/json" id="data">(.*)</script>', block, re.DOTALL)
    assert inner is not None
    assert not set("<>&\u2028\u2029") & set(inner.group(1))
    assert json.loads(inner.group(1)) == {"name": text, text: [1.5, None]} | (
        {"name": [1.5, None]} if text == "name" else {}
    )


def test_numbers_keep_four_digits() -> None:
    assert [number(value) for value in (2.4321987, 1234.5678, 0.031, 3e-7, -math.inf, math.nan, 5, 12345, False)] == [
        "2.432",
        "1,235",
        "0.031",
        "3e-07",
        "\u2212∞",
        "NaN",
        "5",
        "12,345",
        "no",
    ]


def test_only_web_addresses_become_links() -> None:
    for address in (
        "javascript:alert(1)",
        "data:text/html,x",
        'https://a.b/"onclick=x',
        " https://a.b c",
        "file:///etc",
    ):
        assert read(link(address, "label")).tags == []
    assert read(link("https://arxiv.org/abs/2309.14322", HOSTILE)).links == ["https://arxiv.org/abs/2309.14322"]
    assert read(link("https://arxiv.org/abs/2309.14322", HOSTILE)).text == HOSTILE


def test_citations_are_linked_by_what_they_name() -> None:
    cases = {
        "Small-scale proxies (2023), arXiv:2309.14322": "https://arxiv.org/abs/2309.14322",
        "Glorot 2010, https://proceedings.mlr.press/v9/glorot10a.html.": "https://proceedings.mlr.press/v9/glorot10a.html",
        "LeCun et al. 1998, doi:10.1109/5.726791": "https://doi.org/10.1109/5.726791",
    }
    for text, address in cases.items():
        assert read(citation(text)).links == [address]
    given_paper = {"title": HOSTILE, "year": 2023, "url": "https://arxiv.org/abs/2309.14322"}
    assert read(citation(given_paper)).links == ["https://arxiv.org/abs/2309.14322"]
    assert read(citation({"title": "x", "url": "javascript:alert(1)"})).tags == []
    assert read(citation("no address")).text == "no address"
