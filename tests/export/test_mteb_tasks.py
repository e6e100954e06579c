"""mteb's own evaluators on shards give the figures that the trainer's vectors give by hand."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.tars import write_tar
from tests.fixtures.emoji import read_pairs, write_shards
from tests.models.small import small_config
from tools import mteb_tasks as tool
from trainer.data.index import write_index
from trainer.data.tokenize import tokenize, train_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.export.transformers_folder import export_model
from trainer.models.load import model_pixels
from trainer.models.two_tower import build_two_tower
from trainer.programs import mteb_tasks
from trainer.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 40


@torch.no_grad()
def exported(folder: Path) -> tuple[Tensor, Tensor]:
    """An export, and the trainer's vectors of the pictures and names of the first samples."""
    pairs = read_pairs(COUNT)
    tokenizer = train_tokenizer([pair["name"] for pair in pairs], vocab_size=320, length=12)
    model = build_two_tower(small_config(vocabulary=320), tokenizer).eval()
    chosen = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.add_(torch.randn(value.shape, generator=chosen) * 0.1)
    export_model(model, tokenizer, folder)
    pixels = model_pixels(model.config)
    rows = [pixels.decode(pair["png"], max_pixels=10**6) for pair in pairs]
    tokens, mask = tokenize(
        tokenizer, [pair["name"] for pair in pairs], length=model.config.text_length
    )
    images = pixels.normalized(torch.stack(rows))
    features = model(Batch(images, tokens, mask, torch.arange(COUNT)))
    assert features.image is not None
    assert features.text is not None
    return features.image, features.text


def share_among(best: int, queries: Tensor, gallery: Tensor) -> float:
    """How often the row of the same number is among the best."""
    found = (queries @ gallery.T).topk(best, dim=1).indices
    right = (found == torch.arange(len(queries))[:, None]).any(dim=1)
    return right.double().mean().item()


@pytest.mark.heavy
def test_zero_shot_and_retrieval_run_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("mteb", "datasets", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    images, texts = exported(tmp_path / "mine")
    spec = write_shards(tmp_path / "shards", count=COUNT, per_shard=COUNT)
    keys = ["--target", "concept", "--caption", "name", "--out", str(tmp_path / "scores.json")]
    arguments = ["mteb_tasks.py", str(tmp_path / "mine"), "--data", spec, *keys]
    monkeypatch.setattr(sys, "argv", arguments)
    tool.main()
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    first = share_among(1, images, texts)
    assert scores["OwnZeroShot"]["accuracy"] == pytest.approx(first)
    for name, queries, gallery in (("ImageToText", images, texts), ("TextToImage", texts, images)):
        for best in (1, 5, 10, 20):
            found = scores[f"Own{name}Retrieval"][f"recall_at_{best}"]
            assert found == pytest.approx(share_among(best, queries, gallery), abs=1e-5)
    assert f"OwnZeroShot: {first:.4f}" in said


def test_equal_pictures_and_texts_count_once_and_answer_each_other() -> None:
    """By the tables that mteb is given; only their making needs the package."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("mteb", reason="mteb is not installed")
    drawn = [
        mteb_tasks.Sample("p", b"1", None, ["a", "b"]),
        mteb_tasks.Sample("p", b"1", None, ["c"]),
        mteb_tasks.Sample("q", b"2", None, ["a"]),
    ]
    given = []
    for task in mteb_tasks.retrieval_tasks(drawn):
        task.load_data()
        given.append(task.dataset["default"]["test"])
    to_text, to_image = given
    assert to_text["queries"]["id"] == ["p", "q"]
    assert to_text["corpus"]["text"] == ["a", "b", "c"]
    assert to_text["relevant_docs"] == {
        "p": {"text-0": 1, "text-1": 1, "text-2": 1},
        "q": {"text-0": 1},
    }
    assert to_image["relevant_docs"]["text-0"] == {"p": 1, "q": 1}


def test_what_can_not_be_measured_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_shards(tmp_path, count=4, per_shard=4)
    with pytest.raises(DataError, match=r"no sample of .* has a picture and 'colour'"):
        mteb_tasks.read_samples(spec, target="colour", caption=None)
    monkeypatch.setattr(sys, "argv", ["mteb_tasks.py", str(tmp_path), "--data", spec])
    with pytest.raises(ConfigError, match="give --target, --caption or both"):
        tool.main()
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--target", "concept"])
    with pytest.raises(ConfigError, match=r"pip install mteb datasets==3\.6\.0"):
        tool.main()
    with pytest.raises(ConfigError, match=r"has no \{\} for the class name"):
        mteb_tasks.zero_shot_task([], template="a photo")


def test_samples_that_lack_something_are_left_out(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    written = {
        "0": {"png": file.getvalue(), "json": json.dumps({"name": "a b", "cls": "x"}).encode()},
        "1": {"png": file.getvalue(), "json": json.dumps({"name": "c"}).encode()},
        "2": {"json": json.dumps({"name": "d", "cls": "x"}).encode()},
    }
    write_tar(tmp_path / "a.tar", written)
    write_index(str(tmp_path / "a.tar"))
    found = mteb_tasks.read_samples(str(tmp_path / "a.tar"), target="cls", caption="name")
    assert [(sample.name, sample.texts) for sample in found] == [("x", ["a b"])]
