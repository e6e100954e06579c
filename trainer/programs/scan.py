"""What tools/scan.py does: whose towers look, what they are asked, and the page of what was found.

OUT/scan.png and scan.md show the totals; the rest is `trainer.curation.scan`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.comm import Comm, agreed
from trainer.concepts import Bank
from trainer.concepts.count import refuse_fields_of_nobody, told_captions
from trainer.curation.languages import Languages
from trainer.curation.pair import Pair
from trainer.curation.repeats import find_repeats
from trainer.curation.rows import SUFFIX, open_rows
from trainer.curation.scan import ROWS, Questions, scan
from trainer.curation.tagger import (
    Tagger,
    calibrate,
    class_vectors,
    read_thresholds,
    save_thresholds,
)
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.tokenize import load_tokenizer, tokenize
from trainer.errors import ConfigError, DataError
from trainer.evals.labels import class_of
from trainer.evals.samples import Record, values_of
from trainer.models.config import TwoTowerConfig
from trainer.models.folder import folder_settings
from trainer.programs.workdir import encoder, open_workdir
from trainer.run import pixels_of
from trainer.teachers.pair import load_live_pair
from trainer.types import Batch, Features

_CHUNK = 256
_LONGEST = 77
_MOST_BITS = 15
Say = Callable[[str], None]


def scan_from(arguments: Any, comm: Comm, *, say: Say) -> str:
    """What tools/scan.py asks for: the table of totals."""
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is no folder; give another name")
    if (bits := arguments.near_duplicates) is not None and not 0 <= bits <= _MOST_BITS:
        raise ConfigError(f"--near-duplicates {bits}: give 0 to {_MOST_BITS} of 64 bits")
    bank = None if arguments.bank is None else Bank.open(arguments.bank)
    if bank is None and (arguments.tags or arguments.lemmas):
        raise ConfigError("--tags and --lemmas are about concepts: give their --bank")
    pair = _pair_of(arguments, comm)
    tagger = None
    if bank is not None and arguments.tags is not None:
        thresholds, templates = read_thresholds(arguments.tags, bank)
        tagger = Tagger(class_vectors(bank.names, templates, pair.text_vectors), thresholds)
    ask = Questions(
        pair,
        Languages(arguments.languages),
        bank,
        told_captions(arguments.captions, arguments.lemmas, arguments.engine),
        tagger,
        arguments.texts,
    )
    shards = ShardSet.open(arguments.data)
    if bank is not None:
        look = comm.is_main
        agreed(comm, lambda: refuse_fields_of_nobody(shards, ask.captions) if look else None)
    totals = scan(arguments.data, arguments.out, ask, comm, say=say)
    if bits is not None:
        repeats = find_repeats(shards, arguments.out, comm, most_bits=bits, say=say)
        totals = {**totals, "repeats": repeats["repeats"]}
    table = [""]

    def write() -> None:
        table[0] = write_page(arguments.out, shards, totals)

    agreed(comm, write if comm.is_main else lambda: None)
    return table[0]


def calibrate_from(arguments: Any, comm: Comm) -> dict[str, Any]:
    if arguments.bank is None or arguments.target is None:
        raise ConfigError("--calibrate needs --bank and --target, the json key of the class")
    return calibrate_tags(
        _pair_of(arguments, comm),
        Bank.open(arguments.bank),
        arguments.data,
        arguments.target,
        arguments.calibrate,
        comm,
        templates=arguments.templates,
        precision=arguments.precision,
    )


def _pair_of(arguments: Any, comm: Comm) -> Pair:
    return open_pair(
        arguments.model,
        comm,
        caption=arguments.caption,
        images=arguments.images,
        rows=arguments.rows,
    )


def open_pair(model: str, comm: Comm, *, caption: str, images: Sequence[str], rows: int) -> Pair:
    """The towers of a run's newest checkpoint, or of a folder of a pair that transformers saved."""
    if (Path(model) / "checkpoints").is_dir():
        return _trained(model, comm, caption=caption, images=images, rows=rows)
    return _loaded(model, comm, caption=caption, images=images, rows=rows)


def calibrate_tags(
    pair: Pair,
    bank: Bank,
    spec: str,
    target: str,
    out: Path,
    comm: Comm,
    *,
    templates: Sequence[str],
    precision: float,
) -> dict[str, Any]:
    """Thresholds of a bank's concepts from labelled shards, written to the file `out`."""
    images, shows = _labelled(pair, bank, spec, target)
    classes = class_vectors(bank.names, templates, pair.text_vectors)
    found = calibrate(images, shows, classes, precision=precision)
    tags = Tagger(classes, found)(images)
    right = sum(concept in own for own, concept in zip(tags, shows.tolist(), strict=True))
    said = sum(map(len, tags))
    figures = {
        "concepts": len(bank),
        "with_a_threshold": int(np.isfinite(found).sum()),
        "labelled_images": len(images),
        "precision": right / said if said else None,
        "recall": right / len(images),
    }
    about: dict[str, object] = {
        "templates": list(templates),
        "asked_precision": precision,
        "shards": spec,
        "model": pair.identity.teacher,
        "figures": figures,
    }
    agreed(comm, lambda: save_thresholds(out, bank, found, about) if comm.is_main else None)
    return figures


def write_page(out: Path, shards: ShardSet, totals: Mapping[str, Any]) -> str:
    """OUT/scan.md and OUT/scan.png; the table."""
    scores = np.concatenate([_scores(out, name) for name in shards.names])
    rows = [
        *((f"samples {reason}", f"{count:,}") for reason, count in totals["samples"].items()),
        ("mean cosine of image and caption", _said(totals["mean_cosine"])),
        ("words of a caption", _said(totals["mean_words"])),
        ("languages", ", ".join(f"{k} {v:,}" for k, v in _most(totals["languages"]))),
        ("pictures near an earlier one", _said(totals.get("repeats"))),
        *((f"pairs: {name}", _said(value)) for name, value in totals.get("concepts", {}).items()),
    ]
    table = "\n".join(
        ["| figure | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    )
    (out / "scan.md").write_text(table + "\n", encoding="utf-8")
    _plot(scores, out / "scan.png")
    return table


def _scores(out: Path, name: str) -> np.ndarray:
    rows, _ = open_rows(out / ROWS / f"{name}{SUFFIX}", ("status", "score"))
    return rows.score[rows.usable].astype(np.float32)


def _plot(scores: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(scores, bins=60, color="#3465a4")
    axes.set_xlabel("cosine of image and caption")
    axes.set_ylabel("samples")
    axes.set_title(f"{len(scores):,} usable samples")
    figure.savefig(path, dpi=120)


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]


def _said(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _labelled(pair: Pair, bank: Bank, spec: str, target: str) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of the images whose class is in the bank, and which concept each shows."""
    shards, place = ShardSet.open(spec), {name: n for n, name in enumerate(bank.names)}
    vectors, classes, pictures = [], [], []
    for index in range(len(shards)):
        try:
            sample = shards.read(index)
            name = class_of(Record(sample.sample_id, values_of(sample.fields)), target)
            if name is None or str(name) not in place:
                continue
            pictures.append(pair.picture(sample).pixels)
        except (BadSample, DamagedSample):
            continue
        classes.append(place[str(name)])
        if len(pictures) == _CHUNK:
            vectors.append(pair.image_vectors(pictures))
            pictures = []
    vectors.append(pair.image_vectors(pictures))
    if not classes:
        raise DataError(f"no image in {spec} has a concept of the bank as its {target}")
    return torch.cat(vectors), np.array(classes, np.int64)


def _trained(model: str, comm: Comm, **how: Any) -> Pair:
    trained = open_workdir(Path(model), comm)
    section = trained.run.recipe.model
    if trained.tokenizer is None or not isinstance(section, TwoTowerConfig):
        raise ConfigError(f"{model} reads no text, so it can't compare images with captions")
    pixels = pixels_of(trained.run)
    return Pair(
        encoder(trained.model),
        pixels,
        trained.tokenizer,
        name=f"{Path(model).name} at step {trained.restored.step}",
        model_hash=hash_of(trained.model),
        settings=_settings(section.model_dump_json() + pixels.text),
        length=section.text_length,
        dim=section.embed_dim,
        device=comm.device,
        **how,
    )


def _loaded(model: str, comm: Comm, **how: Any) -> Pair:
    if not Path(model).is_dir():
        raise ConfigError(f"{model} is neither a run's workdir nor a folder with a pair of towers")
    tokenizer = load_tokenizer(model)
    text = getattr(folder_settings(model, local_files_only=True), "text_config", None)
    length = min(int(getattr(text, "max_position_embeddings", 64)), _LONGEST)
    live = load_live_pair(Path(model), tokenizer, length=length)
    towers = live.model.to(comm.device)

    def encode(batch: Batch) -> Features:
        image = None if batch.images is None else towers.image.images(batch.images)
        text = None if batch.tokens is None else towers.text(batch.tokens, batch.token_mask)
        return Features(image=image, text=text)

    words = tokenize(tokenizer, ["a"], length=length)
    return Pair(
        encode,
        live.pixels,
        tokenizer,
        name=Path(model).name,
        model_hash=live.digest,
        settings=_settings(live.pixels.text),
        length=length,
        dim=int(towers.text(*(part.to(comm.device) for part in words)).shape[-1]),
        device=comm.device,
        **how,
    )


def hash_of(model: nn.Module) -> str:
    """SHA-256 over names and bytes of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
