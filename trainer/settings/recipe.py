"""What every recipe's own section says to the program around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from trainer.errors import ConfigError
from trainer.settings.data import ViewsConfig
from trainer.settings.section import Frozen, ModelPath, PositiveInt


class ModelSection(Frozen):
    """What a model's section says to the program around it, whatever the model is."""

    image_size: PositiveInt
    """Pixels per side."""
    embed_dim: PositiveInt
    """Width of its features."""


_WHO_READS = {"head": "or use protoclip or mlcd", "bias": "or use siglip"}


class WordsConfig(Frozen):
    """How captions become tokens where no text tower says so."""

    length: PositiveInt = 32
    """Tokens of a caption, begin and end included."""
    vocabulary: PositiveInt | None = 4096
    """Size of the tokenizer that is trained on the corpus; null where one is given."""
    tokenizer: ModelPath | None = None
    """A folder with a tokenizer."""

    @model_validator(mode="after")
    def _one_source_of_words(self) -> WordsConfig:
        if (self.tokenizer is None) == (self.vocabulary is None):
            raise ValueError(
                "give either a `tokenizer`, with `vocabulary: null`, or a `vocabulary`"
            )
        return self


class RecipeConfig(Frozen):
    """A recipe's own section; each recipe's `Config` is one, with a `model` of its own."""

    name: str
    """The recipe's file in trainer/recipes/."""
    model: ModelSection
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which optional parts of a model (`head`, `bias`) the method trains, and whether it can do
    with stored features of images (`stored`); others are refused."""

    @model_validator(mode="after")
    def _no_part_that_is_not_trained(self) -> RecipeConfig:
        for part in ("head", "bias"):
            if getattr(self.model, part, None) and part not in self.reads:
                raise ValueError(f"{self.name} trains no model.{part}; drop it, {_WHO_READS[part]}")
        image = getattr(self.model, "image", None)
        if getattr(image, "stored", None) is not None and "stored" not in self.reads:
            raise ValueError(
                f"{self.name} reads pixels; drop model.image.stored, or use palm or supcon"
            )
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if cls.model_fields["model"].annotation is ModelSection:
            raise ConfigError(
                f"{cls.__module__}.{cls.__name__} declares no model; a recipe's Config needs one, "
                "as `model: TwoTowerConfig = TwoTowerConfig()`"
            )

    def stores(self) -> Sequence[Path]:
        """Embedding stores that images learn to lie beside, in the space of their vectors; texts
        of an evaluation must then be of the same teacher."""
        return ()

    def join(self, seed: int) -> Any:
        """What data workers read beside the images (`trainer.data.prepare.Join`), if anything."""
        return None

    def prompted(self, tokenizer: Any) -> Any:
        """The tokenizer as the method reads texts: with a prompt around them, for example."""
        return tokenizer

    def words(self) -> WordsConfig | None:
        """How captions are cut for a method that reads them without a text tower, if it does."""
        return None

    def knows_the_end(self) -> str | None:
        """The key by which a step depends on how many steps the run has, if one does."""
        return None

    def wanted_views(self) -> ViewsConfig:
        """The views of an image that the method reads; one where a recipe says nothing."""
        return ViewsConfig()
