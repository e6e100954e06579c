"""One HTML file that shows clusters: sizes, samples, neighbours, search. No other file needed."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.pictures.montage import Pixels, Sample, fitted

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:20px;color:#202226}
h1{font-size:22px;margin:0 0 4px} h2{font-size:15px;margin:0 0 6px} p{margin:4px 0;color:#6e727a}
input{font:inherit;padding:7px 10px;width:320px;border:1px solid #c4c8d0;border-radius:6px}
section{border-top:1px solid #dee0e4;padding:12px 0} .row{display:flex;flex-wrap:wrap;gap:10px}
figure{margin:0;width:96px} img{width:96px;height:96px;border:1px solid #eceef1;border-radius:4px}
figcaption{font-size:11px;line-height:1.25;color:#6e727a;overflow-wrap:anywhere;max-height:4.2em;
overflow:hidden} table{border-collapse:collapse} td{padding:1px 14px 1px 0} svg text{fill:#6e727a;
font-size:10px} .hit figcaption{color:#202226;font-weight:600} a{color:#2457a8;margin-right:8px}
"""

_SCRIPT = """
const box=document.querySelector('input'),told=document.querySelector('#told');
const cards=[...document.querySelectorAll('section[data-text]')];
function find(){const words=box.value.toLowerCase().split(/\\s+/).filter(Boolean);let shown=0;
for(const card of cards){const figures=[...card.querySelectorAll('figure')];
for(const f of figures)f.classList.toggle('hit',words.length>0&&
words.every(w=>f.textContent.toLowerCase().includes(w)));
const ok=words.every(w=>card.dataset.text.includes(w));card.hidden=!ok;shown+=ok?1:0;}
told.textContent=shown+' of '+cards.length+' clusters';}
box.addEventListener('input',find);find();
"""


class ClusterCard(NamedTuple):
    """One cluster of the page."""

    number: int
    size: int
    samples: Sequence[Sample]
    nearest: Sequence[int] = ()
    """Other clusters, nearest first; those on the page become links."""


def cluster_page(
    path: Path | str,
    cards: Sequence[ClusterCard],
    *,
    sizes: Sequence[int],
    title: str = "Clusters",
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Write the page: figures, a histogram of `sizes` (all clusters), then the given clusters.

    Captions are escaped, and the page's policy allows nothing from outside. Returns the path.
    """
    shown = {card.number for card in cards}
    body = "".join(_card(card, shown) for card in cards)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>"
        for name, value in (figures or {}).items()
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{len(sizes)} clusters, {sum(sizes)} samples</p>"
        f"<table>{rows}</table>{size_histogram(sizes)}"
        f'<p><input type="search" placeholder="words of a caption" aria-label="search"> '
        f'<span id="told"></span></p>{body}<script>{_SCRIPT}</script></html>',
        encoding="utf-8",
    )
    return path


def size_histogram(sizes: Sequence[int], *, width: int = 560, height: int = 150) -> str:
    """Inline SVG: how many clusters have 0, 1, 2-3, 4-7, 8-15, ... samples."""
    bins = [0] * (max(sizes, default=0).bit_length() + 1)
    for size in sizes:
        bins[size.bit_length()] += 1
    step, floor, most = width / len(bins), height - 32, max(bins) or 1
    parts = []
    for place, count in enumerate(bins):
        bar = (floor - 16) * count / most
        middle = (place + 0.5) * step
        low, high = (0, 0) if place == 0 else (1 << (place - 1), (1 << place) - 1)
        parts.append(
            f'<rect x="{place * step + 2:.1f}" y="{floor - bar:.1f}" width="{step - 4:.1f}"'
            f' height="{bar:.1f}" fill="#7d9cc9"/>'
            f'<text x="{middle:.1f}" y="{floor - bar - 3:.1f}" text-anchor="middle">{count}</text>'
            f'<text x="{middle:.1f}" y="{floor + 12}" text-anchor="middle">'
            f"{low if low == high else f'{_short(low)}-{_short(high)}'}</text>"
        )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="cluster sizes">'
        f'{"".join(parts)}<text x="{width / 2}" y="{height - 4}" text-anchor="middle">'
        f"samples in a cluster (bars: number of clusters)</text></svg>"
    )


def _card(card: ClusterCard, shown: set[int]) -> str:
    words = html.escape(" ".join(caption for _, caption in card.samples).lower(), quote=True)
    near = "".join(
        f'<a href="#c{other}">{other}</a>' if other in shown else f"<span>{other} </span>"
        for other in card.nearest
    )
    return (
        f'<section id="c{card.number}" data-text="{words}"><h2>cluster {card.number}:'
        f" {card.size} samples</h2>"
        f'<div class="row">{"".join(_figure(*sample) for sample in card.samples)}</div>'
        f"{f'<p>nearest: {near}</p>' if near else ''}</section>"
    )


def _figure(image: Pixels, caption: str) -> str:
    text = html.escape(caption, quote=True)
    return (
        f'<figure><img src="{data_url(image)}" alt="{text}" title="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def data_url(image: Pixels) -> str:
    """The image, 96 pixels a side, inside of the page."""
    buffer = io.BytesIO()
    fitted(image, 96).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(count: int) -> str:
    """1023 -> 1023, 65535 -> 66k."""
    if count < 10_000:
        return str(count)
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:.0f}{' kMG'[power]}"
