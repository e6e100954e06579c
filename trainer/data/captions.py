"""Which text of a sample is read this time: a field by weight, an item of a list by hash."""

from __future__ import annotations

from typing import Any

from trainer.config import CaptionConfig
from trainer.data.decode import BadSample
from trainer.data.fields import checked_text, json_of, text_of
from trainer.hashing import key_of, uniform_of

MAX_CHARACTERS = 8192
"""Longer texts are cut here before the tokenizer sees them: its cost has no bound of its own."""


def choose_caption(
    fields: dict[str, bytes], *, sample_id: int, epoch: int, seed: int, config: CaptionConfig
) -> str:
    """One caption, a pure function of (seed, epoch, sample id).

    A field is drawn by its weight among those that the sample has; of a list, one item. White
    space is collapsed. `a.b` reads key b of the json object under key a. BadSample where no field
    with a weight holds any text.
    """
    found = _captions(fields, config)
    if not found:
        raise BadSample(f"no caption in {', '.join(config.fields)}")
    key = key_of(seed, "caption")
    names = [name for name, _, _ in found]
    weights = [weight for _, weight, _ in found]
    index = 0 if len(names) == 1 else _weighted(weights, uniform_of(sample_id, key, epoch, 0))
    texts = found[index][2]
    item = 0 if len(texts) == 1 else int(uniform_of(sample_id, key, epoch, 1) * len(texts))
    return texts[item]


def field_texts(fields: dict[str, bytes], name: str) -> list[str]:
    """The texts of one field, white space collapsed; none where the sample lacks it."""
    record = {} if name == "txt" else json_of(fields)
    return _field(fields, record, name)


def _captions(
    fields: dict[str, bytes], config: CaptionConfig
) -> list[tuple[str, float, list[str]]]:
    """(field, weight, its texts) for every field that has a weight and a text."""
    weights = config.weights or (1.0,) * len(config.fields)
    wanted = [(name, weight) for name, weight in zip(config.fields, weights, strict=True) if weight]
    record = json_of(fields) if any(name != "txt" for name, _ in wanted) else {}
    values = [(name, weight, _field(fields, record, name)) for name, weight in wanted]
    return [value for value in values if value[2]]


def _field(fields: dict[str, bytes], record: dict[str, Any], name: str) -> list[str]:
    return _texts(text_of(fields, name) if name == "txt" else _lookup(record, name), name)


def _lookup(record: Any, name: str) -> Any:
    for part in [name] if isinstance(record, dict) and name in record else name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _texts(value: Any, name: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    texts = [" ".join(item[:MAX_CHARACTERS].split()) for item in items if isinstance(item, str)]
    return [checked_text(text, name) for text in texts if text]


def _weighted(weights: list[float], draw: float) -> int:
    """The index whose share of the total weight holds `draw`."""
    rest = draw * sum(weights)
    for index, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return index
    return len(weights) - 1
