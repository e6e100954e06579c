"""Which texts of a sample a teacher reads, and what is asked about them: templates as data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, field_validator

from trainer.config import Frozen
from trainer.data.captions import field_texts
from trainer.data.decode import BadSample
from trainer.errors import ConfigError
from trainer.settings.errors import explain

_SETS = Path(__file__).parent / "prompt_sets"
_SLOT = "{}"


class Reading(Frozen):
    """One text of a sample and the vectors that are made of it."""

    fields: tuple[str, ...] = Field(default=("txt",), min_length=1)
    """`txt` or json keys; the first that the sample has is read. Lists are joined by commas."""
    template: str = _SLOT
    """The text stands where the braces are."""
    facets: tuple[str, ...] = ()
    """Texts behind the template, each with a vector of its own; one vector where there are none."""
    begin_facets: bool = False
    """A begin-of-text token stands before the first facet, as in FLAME's templates."""
    sentence: bool = False
    """End with a full stop, and have no double quotes within."""

    @field_validator("template")
    @classmethod
    def _one_slot(cls, value: str) -> str:
        if value.count(_SLOT) != 1:
            raise ValueError(f"{value!r} must hold {_SLOT} once, where the text goes")
        return value

    @property
    def num_vectors(self) -> int:
        return max(1, len(self.facets))

    def prompt(self, text: str) -> str:
        """The template with the text in it, without facets."""
        before, _, after = self.template.partition(_SLOT)
        return before + (as_sentence(text) if self.sentence else text) + after


class PromptSet(Frozen):
    """The readings of a sample; its vectors are theirs, in this order."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    readings: tuple[Reading, ...] = Field(min_length=1)

    @property
    def num_vectors(self) -> int:
        return sum(reading.num_vectors for reading in self.readings)

    @property
    def digest(self) -> str:
        """Name and SHA-256 of templates and facets: what was asked, not of which fields."""
        asked = [reading.model_dump_json(exclude={"fields"}) for reading in self.readings]
        return f"{self.name} {hashlib.sha256(chr(10).join(asked).encode()).hexdigest()}"

    @property
    def reads(self) -> str:
        """The fields, as in `txt; long | txt`."""
        return "; ".join(" | ".join(reading.fields) for reading in self.readings)

    def texts(self, fields: dict[str, bytes]) -> tuple[str, ...]:
        """The text of every reading; BadSample where a sample has none of a reading's fields."""
        return tuple(_first_text(fields, reading.fields) for reading in self.readings)

    def with_fields(self, groups: Sequence[str]) -> PromptSet:
        """Read other fields: one group for each reading, alternatives joined by commas.

        A set of one reading is repeated for every group: a vector (or its facets) each.
        """
        readings = self.readings * len(groups) if len(self.readings) == 1 else self.readings
        if len(readings) != len(groups):
            raise ConfigError(
                f"prompts {self.name} have {len(readings)} readings, but fields are given for "
                f"{len(groups)}; alternatives of one reading are joined by commas"
            )
        changed = [
            reading.model_copy(update={"fields": tuple(group.split(","))})
            for reading, group in zip(readings, groups, strict=True)
        ]
        return PromptSet(name=self.name, readings=tuple(changed))

    def behind(self, prompt: str) -> PromptSet:
        """The same with a text before every template."""
        changed = [
            reading.model_copy(update={"template": prompt + reading.template})
            for reading in self.readings
        ]
        return PromptSet(name=self.name, readings=tuple(changed))


def load_prompts(name: str) -> PromptSet:
    """A set by name (`plain`, `flame`) or from a YAML file."""
    path = Path(name)
    if path.suffix != ".yaml":
        path = _SETS / f"{name}.yaml"
    try:
        return PromptSet.model_validate(yaml.safe_load(path.read_text()))
    except OSError:
        known = ", ".join(sorted(found.stem for found in _SETS.glob("*.yaml")))
        raise ConfigError(f"no prompts {name!r}; there are {known}, or a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no prompt set: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no prompt set: {explain(error, PromptSet)}") from error


def as_sentence(text: str) -> str:
    """The text with a full stop at its end, double quotes made single, no question mark last."""
    if not text.endswith((".", "?", '"', "'")):
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def _first_text(fields: dict[str, bytes], names: tuple[str, ...]) -> str:
    for name in names:
        if texts := field_texts(fields, name):
            return ", ".join(texts)
    raise BadSample(f"no text in {', '.join(names)}")
