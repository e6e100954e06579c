"""A run's checkpoint is opened with the very model that it was trained with, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.models.small import save_bert, small_batch, small_config, word_tokenizer
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_state import frozen_digest
from trainer.comm import Comm
from trainer.config import dump_run, parse_run
from trainer.errors import CheckpointError
from trainer.programs.workdir import open_workdir
from trainer.recipe import build_model


def trained_run(folder: Path, recipe: str, text: dict[str, object]) -> Path:
    """A workdir with one checkpoint of a recipe whose text tower is `text`; its weights moved."""
    path = save_bert(folder / "bert")
    model = {**small_config().model_dump(mode="json"), "vocabulary": None}
    model["text"] = {"path": path, **text}
    values = {
        "workdir": str(folder / "run"),
        "steps": 1,
        "global_batch": 2,
        "recipe": {"name": recipe, "model": {k: v for k, v in model.items() if k != "bias"}},
        "data": {"train": "a.tar"},
    }
    run = parse_run(yaml.safe_dump(values))
    built = build_model(run.recipe, word_tokenizer(), Comm.solo(), seed=run.seed)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    held = {n: p.detach() for n, p in built.named_parameters() if p.requires_grad}
    held |= dict(built.named_buffers())
    state = {"frozen_weights": frozen_digest(built)}
    checkpoints = Checkpointer(run.workdir / "checkpoints", Comm.solo())
    checkpoints.save(1, {"weights": held}, state, {"run.yaml": dump_run(run)})
    torch.save(built.eval()(small_batch()).text, folder / "expected.pt")
    return run.workdir


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("clip", {"trained": False}),
        ("siglip", {"lora": {"rank": 2}}),
        ("protoclip", {"trained": True}),
    ],
)
def test_a_base_folder_that_moved_is_named_and_its_new_place_is_taken(tmp_path, recipe, text):
    workdir = trained_run(tmp_path, recipe, text)
    shutil.move(tmp_path / "bert", tmp_path / "moved")
    with pytest.raises(CheckpointError) as caught:
        open_workdir(workdir, Comm.solo())
    assert "recipe.model.text.path of the run is" in str(caught.value)
    assert "recipe.model.text.path=FOLDER" in str(caught.value)
    place = f"recipe.model.text.path={tmp_path / 'moved'}"
    model = open_workdir(workdir, Comm.solo(), [place]).model
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    torch.testing.assert_close(model(small_batch()).text, expected, rtol=0, atol=0)


@pytest.mark.parametrize("text", [{"trained": False}, {"lora": {"rank": 2}}])
def test_frozen_weights_that_were_exchanged_are_refused(tmp_path, text):
    workdir = trained_run(tmp_path, "clip", text)
    weights = load_file(tmp_path / "bert/model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(weights, tmp_path / "bert/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"are not those that .*run was trained with"):
        open_workdir(workdir, Comm.solo())
