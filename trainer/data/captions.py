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

    A field is drawn by its weight among those that the sample has; of its captions, as
    `captions_in` finds them, one. A field is a member, or else a json key, of which `a.b` reads
    key b of the object under key a. BadSample where no field with a weight holds any text.
    """
    found = _captions(fields, config)
    if not found:
        raise BadSample(f"no caption in {', '.join(config.fields)}")
    key = key_of(seed, "caption")

    def one_of(texts: list[str]) -> str:
        item = 0 if len(texts) == 1 else int(uniform_of(sample_id, key, epoch, 1) * len(texts))
        return texts[item]

    if config.combine == "concat":
        return "; ".join(one_of(texts) for _, _, texts in found)
    weights = [weight for _, weight, _ in found]
    index = 0 if len(found) == 1 else _weighted(weights, uniform_of(sample_id, key, epoch, 0))
    return one_of(found[index][2])


def captions_in(value: Any) -> list[str]:
    """The captions that a text or a list holds, white space collapsed; none in anything else.

    Every item of a list is one, and so is every line of a text. Training draws one of them, and
    retrieval searches for each.
    """
    return _cut(value.splitlines() if isinstance(value, str) else value)


def value_at(record: Any, name: str) -> Any:
    """What stands in json under a key, or under `a.b`; None where there is nothing."""
    for part in [name] if isinstance(record, dict) and name in record else name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def field_texts(fields: dict[str, bytes], name: str) -> list[str]:
    """What a teacher reads of one field: a text whole, of a list each item; none where it lacks.

    White space is collapsed.
    """
    value = _value(fields, _record(fields, [name]), name)
    return _checked(_cut(value if isinstance(value, list) else [value]), name)


def is_member(fields: dict[str, bytes], name: str) -> bool:
    """Whether a field is a member of this sample and not a json key."""
    return name != "json" and (name == "txt" or name.lower() in fields)


def _captions(
    fields: dict[str, bytes], config: CaptionConfig
) -> list[tuple[str, float, list[str]]]:
    """(field, weight, its texts) for every field that has a weight and a text."""
    weights = config.weights or (1.0,) * len(config.fields)
    wanted = [(name, weight) for name, weight in zip(config.fields, weights, strict=True) if weight]
    record = _record(fields, [name for name, _ in wanted])
    values = [
        (name, weight, _checked(captions_in(_value(fields, record, name)), name))
        for name, weight in wanted
    ]
    return [value for value in values if value[2]]


def _record(fields: dict[str, bytes], names: list[str]) -> dict[str, Any]:
    """The sample's json where one of the fields is a key of it."""
    return {} if all(is_member(fields, name) for name in names) else json_of(fields)


def _value(fields: dict[str, bytes], record: dict[str, Any], name: str) -> Any:
    if is_member(fields, name):
        return text_of(fields, name.lower())
    return value_at(record, name)


def _cut(items: Any) -> list[str]:
    if not isinstance(items, list):
        return []
    texts = [" ".join(item[:MAX_CHARACTERS].split()) for item in items if isinstance(item, str)]
    return [text for text in texts if text]


def _checked(texts: list[str], name: str) -> list[str]:
    return [checked_text(text, name) for text in texts]


def _weighted(weights: list[float], draw: float) -> int:
    """The index whose share of the total weight holds `draw`."""
    rest = draw * sum(weights)
    for index, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return index
    return len(weights) - 1
