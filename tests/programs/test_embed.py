"""tools/embed.py as a user calls it, and a run's own image tower as a teacher."""

import sys

import pytest
import torch

from tests.export.test_transformers_folder import HEAD, moved_model, run_yaml
from tests.fixtures.emoji import write_shards
from tests.models.small import small_batch, word_tokenizer
from tests.teachers.small_teachers import save_llama
from tools import embed as tool
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_state import frozen_digest
from trainer.comm import Comm
from trainer.data.decode import decode_image
from trainer.data.fields import find_image
from trainer.data.shards import ShardSet
from trainer.data.views import normalize
from trainer.errors import ConfigError, DataError
from trainer.store import EmbeddingStore


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, arguments)])
    tool.main()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank without a group."""
    monkeypatch.setattr(tool.Comm, "from_environment", tool.Comm.solo)


@pytest.mark.heavy
def test_plan_build_verify_project_and_pack(tmp_path, monkeypatch, capsys):
    llm = save_llama(tmp_path / "llm")
    spec = write_shards(tmp_path / "shards", count=24, per_shard=10)
    teacher = (
        "--teacher",
        llm,
        "layer=2",
        "prompts=flame",
        "pooling=last",
        "fields=[txt, txt, txt]",
    )
    call(monkeypatch, *teacher, "--plan", "--dims", 16)
    assert "LAION-400M" in capsys.readouterr().out
    store = ("--data", spec, "--out", tmp_path / "store")
    call(monkeypatch, *teacher, *store)
    assert "done: 24 samples x 11 vectors of 32 dimensions" in capsys.readouterr().out
    call(monkeypatch, *teacher, *store)
    assert "nothing to do, already there: 24 samples" in capsys.readouterr().out
    call(monkeypatch, *teacher, *store, "--verify")
    assert "whole, and 3 samples computed again agree" in capsys.readouterr().out
    with pytest.raises(DataError, match="with layer 2, not 3"):
        call(monkeypatch, *teacher, *store, "layer=3")
    call(monkeypatch, "--fit-pca", tmp_path / "store", "--dims", 8, "--out", tmp_path / "pca")
    assert "8 of 32 components keep" in capsys.readouterr().out
    small = tmp_path / "small"
    call(
        monkeypatch,
        *teacher,
        "--data",
        spec,
        "--out",
        small,
        "--pca",
        tmp_path / "pca",
        "--dtype",
        "int8",
    )
    again = tmp_path / "again"
    call(
        monkeypatch,
        "--data",
        spec,
        "--out",
        again,
        "--project",
        tmp_path / "store",
        "--dims",
        8,
        "--dtype",
        "int8",
    )
    direct, projected = EmbeddingStore.open(small), EmbeddingStore.open(again)
    ids = torch.from_numpy(direct.ids.copy())
    # the second was rounded to float16 before it was projected
    assert (direct.vectors(ids) - projected.vectors(ids)).abs().max() < 0.02
    assert (direct.dim, direct.num_vectors, direct.identity.dtype) == (8, 11, "int8")


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--teachers", "--cache", tmp_path)
    assert "use-multilingual" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give --data SHARDS and --out FOLDER"):
        call(monkeypatch, "--data", "x")
    with pytest.raises(ConfigError, match="give --out FILE"):
        call(monkeypatch, "--fit-pca", tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="read with kind=image"):
        call(monkeypatch, "--teacher", tmp_path / "run", "--plan")


@pytest.mark.heavy
def test_a_runs_image_tower_is_a_teacher(tmp_path, monkeypatch, capsys):
    """The vectors are the features that the run's model gives for the same pixels."""
    model = moved_model()
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {name: value.detach() for name, value in weights.items()}
    checkpoints = Checkpointer(tmp_path / "checkpoints", Comm.solo())
    state = {"frozen_weights": frozen_digest(model)}
    checkpoints.save(7, {"weights": held}, state, {"run.yaml": run_yaml(head=HEAD)})
    spec = write_shards(tmp_path / "shards", count=6, per_shard=6)
    call(monkeypatch, "--teacher", tmp_path, "kind=image", "--data", spec, "--out", tmp_path / "s")
    store, shards = EmbeddingStore.open(tmp_path / "s"), ShardSet.open(spec)
    assert store.identity.teacher.endswith("at step 7")
    size = model.config.image_size
    raw = [
        decode_image(
            find_image(shards.read(index).fields),
            size=size,
            background=(255, 255, 255),
            max_pixels=10**6,
        )
        for index in range(6)
    ]
    batch = small_batch()._replace(images=normalize(torch.stack(raw)))
    with torch.no_grad():
        live = model.image.images(batch.images)
    live = torch.nn.functional.normalize(live, dim=-1)
    assert (store.rows(torch.from_numpy(shards.ids)) - live).abs().max() < 1e-3
