"""A teacher's text vectors beside a plain transformers loop: same model, texts and process."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.bench.options import SHARDS
from trainer.data.decode import BadSample
from trainer.data.shards import ShardSet
from trainer.data.tokenize import token_ids
from trainer.errors import ConfigError, DataError
from trainer.models.pooling import pooled
from trainer.teachers.batches import length_batches
from trainer.teachers.spec import TeacherSpec, load_teacher, read_spec
from trainer.teachers.text import TextTeacher


class Timed(NamedTuple):
    seconds: float
    """CPU time of the best round (wall time on a GPU)."""
    vectors: Tensor


def add_options(command: ArgumentParser) -> None:
    command.add_argument("settings", nargs="*", metavar="key=value", help="changes of the teacher")
    command.add_argument("--teacher", default="minilm", help="pinned name, folder or YAML")
    command.add_argument("--data", default=SHARDS, help="shards")
    command.add_argument("--texts", type=int, default=512, help="the first of the shards")
    command.add_argument("--batch", type=int, default=32, help="texts of a batch of the plain loop")
    command.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--cache", type=Path, default=Path("cache"))


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(options.threads)
    return run(
        options.data,
        read_spec(options.teacher, options.settings),
        texts=options.texts,
        batch=options.batch,
        rounds=options.rounds,
        device="cuda" if torch.cuda.is_available() else "cpu",
        cache=options.cache,
    )


def run(
    data: str,
    spec: TeacherSpec,
    *,
    texts: int,
    batch: int,
    rounds: int,
    device: str,
    cache: Path,
) -> list[dict[str, Any]]:
    """Texts per second of both sides, taken in turns, for texts that all differ and as they come.

    The plain side takes `batch` texts at a time in the order of the shards, pads each batch to
    its longest, and calls the model; ours has as many tokens in a batch as that has on average.
    """
    teacher = load_teacher(spec, device=device, cache=cache)
    if not isinstance(teacher, TextTeacher):
        raise ConfigError(f"{spec.model} does not read texts")
    found = _texts(data, teacher, texts)
    unique = list(dict.fromkeys(found))
    cases = {"as they come": found, "all different": unique}
    return [_case(name, teacher, some, batch, rounds) for name, some in cases.items()]


def _case(
    name: str, teacher: TextTeacher, texts: Sequence[str], batch: int, rounds: int
) -> dict[str, Any]:
    lengths = [len(row) for row in token_ids(teacher.tokenizer, texts, length=teacher.length)]
    plain_groups = [
        range(len(texts))[start : start + batch] for start in range(0, len(texts), batch)
    ]
    plain_tokens = _padded(lengths, plain_groups)
    teacher.budget.tokens = max(1, plain_tokens // len(plain_groups))
    own_groups = list(length_batches(lengths, max_tokens=teacher.budget.tokens))
    plain, own = _in_turns(
        lambda: _plain(teacher, texts, batch),
        lambda: teacher.encode_texts(texts)[:, 0],
        rounds=rounds,
        device=teacher.device,
    )
    return {
        "texts": name,
        "count": len(texts),
        "tokens": sum(lengths),
        "plain_padding": 1 - sum(lengths) / plain_tokens,
        "padding": 1 - sum(lengths) / _padded(lengths, own_groups),
        "plain_per_s": len(texts) / plain.seconds,
        "per_s": len(texts) / own.seconds,
        "ratio": plain.seconds / own.seconds,
        "difference": float((plain.vectors - own.vectors).abs().max()),
    }


@torch.inference_mode()
def _plain(teacher: TextTeacher, texts: Sequence[str], batch: int) -> Tensor:
    """What one writes without thinking of lengths."""
    parts = []
    for start in range(0, len(texts), batch):
        inputs = teacher.tokenizer(
            list(texts[start : start + batch]),
            padding="longest",
            truncation=True,
            max_length=teacher.length,
            return_tensors="pt",
            padding_side="right",
        ).to(teacher.device)
        mask = inputs["attention_mask"]
        states = teacher.states.model(
            input_ids=inputs["input_ids"], attention_mask=mask
        ).last_hidden_state
        vectors = pooled(states, mask.bool(), teacher.pooling)  # type: ignore[arg-type]
        parts.append(torch.nn.functional.normalize(vectors, dim=-1).cpu())
    return torch.cat(parts)


def _in_turns(
    first: Callable[[], Tensor],
    second: Callable[[], Tensor],
    *,
    rounds: int,
    device: torch.device,
) -> tuple[Timed, Timed]:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    results = [first(), second()]  # warms up
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, compute in enumerate((first, second)):
            start = clock()
            compute()
            seconds[side].append(clock() - start)
    return Timed(min(seconds[0]), results[0]), Timed(min(seconds[1]), results[1])


def _padded(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    """Tokens that a model sees, padding included."""
    return sum(len(group) * max(lengths[index] for index in group) for group in groups)


def _texts(data: str, teacher: TextTeacher, count: int) -> list[str]:
    """The first texts of the shards, in their order."""
    shards = ShardSet.open(data)
    found: list[str] = []
    for index in range(len(shards)):
        try:
            found.append(teacher.read(shards.read(index))[0])
        except BadSample:
            continue
        if len(found) == count:
            return found
    raise DataError(f"{data} has {len(found)} such texts, not {count}")
