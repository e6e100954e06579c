"""One HTML file of lexical vectors: an image's words, a word's images, and where each is said."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from trainer.pictures.montage import Pixels
from trainer.pictures.page import POLICY, data_url

Heat = Float[np.ndarray, "side side"]
RED = np.array([226.0, 40.0, 40.0])
MOST_RED = 0.7
"""Of a pixel where a word is said loudest."""

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:20px;color:#202226}
h1{font-size:22px;margin:0 0 4px} h2{font-size:18px;margin:26px 0 8px} p{margin:4px 0;color:#5c6068}
section{border-top:1px solid #dee0e4;padding:12px 0;display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0;width:96px} img{width:96px;height:96px;border:1px solid #eceef1;border-radius:4px}
figcaption{font-size:11px;line-height:1.25;color:#5c6068;overflow-wrap:anywhere;max-height:3.8em;
overflow:hidden} table{border-collapse:collapse} td{padding:1px 12px 1px 0;vertical-align:middle}
.bar{background:#7d9cc9;height:9px;border-radius:2px;min-width:1px} .right{color:#16824a;
font-weight:600} .words{width:250px} h3{font-size:15px;margin:0;width:120px;overflow-wrap:anywhere}
"""


class Said(NamedTuple):
    """A word of an image."""

    word: str
    value: float
    right: bool
    """Whether the image's caption or keywords have it."""
    heat: Heat | None = None
    """How loudly each patch says it; None where no map is shown."""


class ImageCard(NamedTuple):
    """An image, and its words, the loudest first."""

    pixels: Pixels
    caption: str
    words: Sequence[Said]


class WordCard(NamedTuple):
    """A word, and the images that say it loudest."""

    word: str
    images: Sequence[tuple[Pixels, str, Heat]]
    """Pixels, caption and where."""


def words_page(
    path: Path,
    images: Sequence[ImageCard],
    words: Sequence[WordCard],
    *,
    title: str,
    figures: Mapping[str, str],
) -> Path:
    """Write the page. Captions and words are escaped, and nothing from outside is allowed."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in figures.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>"
        f"<h2>The words of an image</h2><p>Green: of its caption or keywords. Red: the patches "
        f"that say the word loudest, each map from its least to its largest value.</p>"
        f"{''.join(map(_image_section, images))}<h2>The images of a word</h2>"
        f"{''.join(map(_word_section, words))}</html>",
        encoding="utf-8",
    )
    return path


def with_heat(pixels: Pixels, heat: Heat) -> Pixels:
    """The image, redder where the map is larger; a map without any difference changes nothing."""
    low, high = float(heat.min()), float(heat.max())
    share = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    small = Image.fromarray((255 * share).round().astype(np.uint8))
    size = (pixels.shape[1], pixels.shape[0])
    smooth = np.asarray(small.resize(size, Image.Resampling.BILINEAR), dtype=np.float64) / 255
    weight = MOST_RED * smooth[:, :, None]
    mixed: Pixels = (pixels * (1 - weight) + RED * weight).round().astype(np.uint8)
    return mixed


def _image_section(card: ImageCard) -> str:
    loudest = max((said.value for said in card.words), default=1.0)
    rows = "".join(_row(said, loudest) for said in card.words)
    maps = "".join(
        _figure(with_heat(card.pixels, said.heat), said.word)
        for said in card.words
        if said.heat is not None
    )
    return (
        f"<section>{_figure(card.pixels, card.caption)}"
        f'<table class="words">{rows}</table>{maps}</section>'
    )


def _row(said: Said, loudest: float) -> str:
    width = 110 * said.value / loudest
    kind = ' class="right"' if said.right else ""
    return (
        f"<tr><td{kind}>{html.escape(said.word)}</td><td>{said.value:.3f}</td>"
        f'<td><div class="bar" style="width:{width:.0f}px"></div></td></tr>'
    )


def _word_section(card: WordCard) -> str:
    shown = "".join(
        _figure(with_heat(pixels, heat), caption) for pixels, caption, heat in card.images
    )
    return f"<section><h3>{html.escape(card.word)}</h3>{shown}</section>"


def _figure(pixels: Pixels, caption: str) -> str:
    text = html.escape(caption, quote=True)
    return (
        f'<figure><img src="{data_url(pixels)}" alt="{text}" title="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
