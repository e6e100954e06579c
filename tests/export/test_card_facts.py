"""Licences as the samples state them, and nothing where they are silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.data.tars import write_tar
from trainer.data.index import write_index
from trainer.export.card_facts import (
    OWN,
    figures_section,
    front_matter,
    origin_section,
    stated_licences,
)


def shard(path: Path, licences: list[str | None]) -> str:
    samples = {}
    for number, licence in enumerate(licences):
        values = {"name": f"n{number}"} | ({} if licence is None else {"license": licence})
        samples[f"{number:03}"] = {"json": json.dumps(values).encode()}
    write_tar(path, samples)
    write_index(str(path))
    return str(path)


def test_every_licence_is_named_with_its_count_and_the_silent_samples_too(tmp_path: Path) -> None:
    spec = shard(tmp_path / "a.tar", ["CC-BY-4.0", "CC-BY-4.0", "MIT", None, None])
    assert stated_licences(spec) == (
        "Trained on `a.tar`. Licences that its samples state, of 5 samples: CC-BY-4.0 (2), MIT (1)"
        "; 2 state none. The weights may be bound by their terms."
    )
    assert stated_licences(shard(tmp_path / "b.tar", [None])) is None
    assert stated_licences(str(tmp_path / "gone.tar")) is None


def test_the_manifest_of_a_corpus_says_whose_pictures_they_are(tmp_path: Path) -> None:
    """Of the splits that were trained on, and of no others."""
    spec = shard(tmp_path / "train-000000.tar", ["CC-BY-4.0"])
    manifest = {
        "shards": {"train-000000.tar": {"split": "train"}, "val-000000.tar": {"split": "val"}},
        "splits": {"train": {"vendors": {"b": 1, "a": 2}}, "val": {"vendors": {"c": 1}}},
        "vendors": {name: {"licence": f"L-{name}"} for name in "abc"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    said = stated_licences(spec)
    assert said is not None
    assert "CC-BY-4.0 (1). By the manifest beside them: a L-a, b L-b. The weights" in said
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": {}}))
    assert "manifest" not in str(stated_licences(spec))


@pytest.mark.parametrize("loads_as", ["CLIPModel", "SiglipModel", "towers apart", OWN])
@pytest.mark.parametrize("forms", [(), ("open_clip", "onnx")])
def test_a_hub_reads_the_front_matter(loads_as: str, forms: tuple[str, ...]) -> None:
    """By the hub's own reader of cards, beside plain YAML."""
    text = front_matter(loads_as, forms=forms) + "# Title\n\n---\n"
    values = yaml.safe_load(text.split("---")[1])
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.to_dict() == values
    assert card.text.strip().startswith("# Title")
    assert card.data.license == "other"
    assert (card.data.license_name, card.data.license_link) == ("see-training-data", "README.md")
    assert set(forms) <= set(card.data.tags)
    library = None if loads_as == OWN else "open_clip" if forms else "transformers"
    assert card.data.library_name == library


def test_sections_without_facts_are_left_out(tmp_path: Path) -> None:
    assert figures_section("", step=3) == ""
    assert origin_section(tmp_path, step=3) == ""
