"""What the vectors of a run of LexVLA say: figures, and a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.hashing import key_of, permutation
from trainer.kernels.patch_maximum import elu1p
from trainer.models.lexical_tower import LexicalTowers
from trainer.pictures.montage import Pixels
from trainer.pictures.words_page import ImageCard, Said, WordCard, words_page
from trainer.programs.words_figures import (
    Seen,
    mosaic_figures,
    precision_figures,
    read_images,
    search_figures,
    words_in,
)
from trainer.programs.workdir import Trained, open_workdir
from trainer.run import eval_context

SHOWN_WORDS, MAPS, SHOWN_IMAGES = 8, 3, 7
"""Words of an image, those of them with a map, and images of a word."""


def words_of_run(
    workdir: Path,
    spec: str | None = None,
    *,
    out: Path | None = None,
    limit: int = 512,
    shown: int = 24,
    overrides: Sequence[str] = (),
) -> tuple[Path, dict[str, float]]:
    """Measure and write `words.html`; of the run's first evaluation's shards where `spec` is None.

    ConfigError where the run's vectors stand over no words.
    """
    trained = open_workdir(workdir, Comm.solo(), overrides)
    model = trained.model
    if not isinstance(model, LexicalTowers):
        raise ConfigError(
            f"{workdir} was trained by {trained.run.recipe.name}, whose vectors stand over no "
            "words; give the folder of a run of lexvla"
        )
    context = eval_context(trained.run, Comm.solo(), trained.tokenizer)
    places = [entry.data for entry in trained.run.evals]
    with torch.no_grad():
        seen = read_images(spec or (places or [trained.run.data.train])[0], model, context, limit)
        names = word_names(trained)
        right = [words_in(record, names) for record in seen.records]
        figures = search_figures(seen, model, context)
        figures |= precision_figures(seen.rows, right)
        figures |= mosaic_figures(seen, model, context)
        told = {name: f"{value:.4g}" for name, value in figures.items()}
        path = words_page(
            out or workdir / "pictures" / "words.html",
            image_cards(seen, model, names, right, shown),
            word_cards(seen, model, names, shown),
            title=f"Words of {workdir.name}",
            figures=told,
        )
    return path, figures


def word_names(trained: Trained) -> list[str]:
    """Each coordinate's word as people write it."""
    assert trained.tokenizer is not None
    assert isinstance(trained.model, LexicalTowers)
    return [
        str(trained.tokenizer.decode([token])).strip() for token in trained.model.word_ids.tolist()
    ]


def heat_of(seen: Seen, model: LexicalTowers, image: int, word: int) -> Tensor:
    """How loudly each patch of an image says a word, as a square."""
    num_states = seen.patches.shape[1]
    side = model.patches_a_side(num_states)
    patches = seen.patches[image, num_states - side * side :]
    return elu1p(patches @ model.image_words.weight[word]).view(side, side)


def image_cards(
    seen: Seen, model: LexicalTowers, names: Sequence[str], right: Sequence[set[int]], shown: int
) -> list[ImageCard]:
    cards = []
    for image in permutation(len(seen.rows), key_of(0, "shown"))[:shown].tolist():
        values, words = seen.rows[image].topk(min(SHOWN_WORDS, len(names)))
        said = [
            Said(
                names[word],
                value,
                word in right[image],
                heat_of(seen, model, image, word).numpy() if place < MAPS else None,
            )
            for place, (value, word) in enumerate(zip(values.tolist(), words.tolist(), strict=True))
        ]
        cards.append(ImageCard(_shown(seen, image), seen.captions[image], said))
    return cards


def word_cards(
    seen: Seen, model: LexicalTowers, names: Sequence[str], shown: int
) -> list[WordCard]:
    """Words that are some image's first, the most frequent ones."""
    first = seen.rows.argmax(dim=1)
    frequent = torch.bincount(first, minlength=len(names)).argsort(descending=True, stable=True)
    cards = []
    for word in frequent[: min(shown, len(first.unique()))].tolist():
        images = seen.rows[:, word].topk(min(SHOWN_IMAGES, len(seen.rows))).indices.tolist()
        shown_images = [
            (_shown(seen, image), seen.captions[image], heat_of(seen, model, image, word).numpy())
            for image in images
        ]
        cards.append(WordCard(names[word], shown_images))
    return cards


def _shown(seen: Seen, image: int) -> Pixels:
    return seen.images[image].permute(1, 2, 0).numpy()
