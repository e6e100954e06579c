"""Pictures and pages of clusters: sizes, what is drawn where, and nothing from outside."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.pictures.montage import RIGHT, Hit, Pixels, cluster_montage, fitted, retrieval_montage
from trainer.pictures.page import ClusterCard, cluster_page, size_histogram


def plain(colour: tuple[int, int, int], height: int = 40, width: int = 40) -> Pixels:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def area(sheet: Pixels, colour: tuple[int, int, int]) -> int:
    """Pixels of exactly this colour."""
    return int((sheet == np.array(colour, dtype=np.uint8)).all(2).sum())


def test_every_image_is_drawn_whole_and_in_its_row() -> None:
    red, green, blue = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    groups = [[(plain(red), "a red square"), (plain(green), "")], [(plain(blue), "wide " * 50)]]
    sheet = cluster_montage(groups, titles=["cluster 0: 2 samples", "cluster 1: 1 samples"])
    assert sheet.dtype == np.uint8
    for colour in (red, green, blue):
        assert area(sheet, colour) == 104 * 104
    rows = [np.flatnonzero((sheet == colour).all(2).any(1)).mean() for colour in (red, blue)]
    assert rows[0] < rows[1]
    without = cluster_montage(groups, titles=["", ""])
    assert (sheet != without).any(), "titles are drawn"
    assert area(cluster_montage(groups, titles=["", ""], columns=1), green) == 0


def test_shape_of_an_image_is_kept() -> None:
    square = np.asarray(fitted(plain((0, 0, 0), height=20, width=80), 64))
    assert area(square, (0, 0, 0)) == 64 * 16
    assert fitted(plain((0, 0, 0), height=1, width=500), 64).size == (64, 64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.text(max_size=80), max_size=4), min_size=1, max_size=3))
def test_any_text_can_be_drawn(captions: list[list[str]]) -> None:
    groups = [[(plain((9, 9, 9)), caption) for caption in group] for group in captions]
    titles = ["".join(group) for group in captions]
    sheet = cluster_montage(groups, titles=titles, tile=32)
    assert area(sheet, (9, 9, 9)) >= 32 * 32 * sum(map(len, captions))
    hits = [Hit(caption, right=False) for group in captions for caption in group]
    assert retrieval_montage([(plain((9, 9, 9)), hits)]).ndim == 3


def test_right_texts_are_marked() -> None:
    image = plain((200, 200, 10))
    hits = [Hit("a dog", right=False), Hit("a cat", right=True), Hit("a cow", right=False)]
    marked = retrieval_montage([(image, hits), (image, hits)])
    wrong = retrieval_montage([(image, [hit._replace(right=False) for hit in hits])] * 2)
    assert area(marked, RIGHT) > 100
    assert area(wrong, RIGHT) == 0
    assert area(marked, (200, 200, 10)) == 2 * 104 * 104


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="no query"):
        retrieval_montage([])
    with pytest.raises(ValueError, match="1 groups and 0 titles"):
        cluster_montage([[]], titles=[])


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sections: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "section":
            self.sections.append(values)


def test_page_is_whole_and_trusts_no_caption(tmp_path: Path) -> None:
    attack = '"><script src="http://evil.example/x.js"></script><img src=x onerror=alert(1)>'
    cards = [
        ClusterCard(3, 12, [(plain((1, 2, 3)), "red APPLE"), (plain((9, 9, 9)), attack)], [7, 9]),
        ClusterCard(7, 1, [(plain((4, 5, 6)), "pear & plum")]),
    ]
    path = cluster_page(
        tmp_path / "new" / "page.html", cards, sizes=[12, 1, 0], title=attack, figures={"nmi": 0.5}
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 3
    assert all(link.startswith(("data:image/webp;base64,", "#c")) for link in page.links)
    assert [section["id"] for section in page.sections] == ["c3", "c7"]
    assert "red apple" in str(page.sections[0]["data-text"])
    assert '<a href="#c7">7</a><span>9 </span>' in text
    first = next(link for link in page.links if link.startswith("data:"))
    picture = Image.open(io.BytesIO(base64.b64decode(first.split(",")[1])))
    assert picture.size == (96, 96)
    assert "default-src 'none'" in text


@settings(deadline=None)
@given(st.lists(st.integers(0, 5_000_000), max_size=50))
def test_histogram_counts_every_cluster(sizes: list[int]) -> None:
    numbers = re.findall(r'middle">([^<]*)</text>', size_histogram(sizes))
    bars = numbers[:-1:2]  # a count, then its range; at the end the title
    assert sum(map(int, bars)) == len(sizes)
    assert int(bars[0]) == sizes.count(0)
