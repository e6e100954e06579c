"""A payload in every kind of file that is loaded: none runs, none writes elsewhere, each is said.

Each payload, were it run or unpacked, would leave a mark.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.data.tars import write_members
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import DataConfig, load_run, parse_run
from trainer.data.captions import choose_caption
from trainer.data.catalogue import open_catalogue
from trainer.data.decode import BadSample, decode_image
from trainer.data.generated import read_generated
from trainer.data.index import read_index, write_index
from trainer.data.labels import ClusterLabels
from trainer.data.pixels import folder_pixels
from trainer.data.selection import read_shares
from trainer.data.shards import RawSample, ShardSet
from trainer.data.tokenize import load_tokenizer
from trainer.errors import TrainerError
from trainer.export.native import load_exported
from trainer.models.folder import load_folder
from trainer.models.sentence_folder import load_maps, read_sentence_folder
from trainer.running.spikes import read_left_out
from trainer.store import EmbeddingStore
from trainer.teachers.existing_vectors import VectorFiles


class Mark:
    """What an unpickler would call."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Mark(mark))


def as_torch(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Mark(mark)}, buffer)
    return buffer.getvalue()


def as_numpy(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Mark(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def as_zip(mark: Path) -> bytes:
    """Names that an unpacker would follow out of its folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"../../../../../../..{mark}", b"x")
        archive.writestr(str(mark), b"x")
    return buffer.getvalue()


def as_code(mark: Path) -> bytes:
    return f"import os\nos.mkdir({str(mark)!r})\n".encode()


BYTES: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "torch.save": as_torch,
    "an array of objects": as_numpy,
    "a zip": as_zip,
    "code": as_code,
}


def forged_checkpoint(folder: Path, name: str, data: bytes) -> Checkpointer:
    """With every sum right: whoever sends checkpoints can compute them."""
    checkpoints = Checkpointer(folder, Comm.solo())
    tensors = {"weights": {"w": torch.zeros(3)}}
    place = checkpoints.save(1, tensors, {"progress": {}}, {"run.yaml": "steps: 1\n"})
    manifest = json.loads((place / "manifest.json").read_bytes())
    (entry,) = [entry for entry in manifest["files"] if entry["name"].startswith(name)]
    (place / entry["name"]).write_bytes(data)
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    (place / "manifest.json").write_bytes(text)
    summed = f"{hashlib.sha256(text).hexdigest()}  manifest.json\n"
    (place / "manifest.sha256").write_text(summed)
    return checkpoints


def checkpoint(name: str) -> Callable[[Path, bytes], Any]:
    def load(folder: Path, data: bytes) -> None:
        restored = forged_checkpoint(folder, name, data).latest(warn=lambda line: None)
        assert restored is not None
        dict(restored.tensors("weights"))

    return load


def in_place(name: str, load: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def loaded(folder: Path, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        load(folder)

    return loaded


def model_of(folder: Path, name: str, data: bytes, **more: Any) -> None:
    """A folder of a small model that names code of its own, and has `data` under a file's name."""
    settings = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 9,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "architectures": ["BertModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
        **more,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_bytes(data)
    (folder / name).write_bytes(data)


def weights(name: str) -> Callable[[Path, bytes], Any]:
    def load(folder: Path, data: bytes) -> None:
        model_of(folder, name, data)
        load_folder(folder, part="text", local_files_only=True)

    return load


def own_kind(folder: Path, data: bytes) -> None:
    model_of(folder, "own.py", data, model_type="own")
    load_folder(folder, part="text", local_files_only=True)


def kernel(folder: Path, data: bytes) -> None:
    """Attention that a hub's repository computes, by code that is fetched and run."""
    model_of(folder, "own.py", data, attn_implementation="somebody/attention")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    load_folder(folder, part="text", local_files_only=True)


def tokenizer(name: str) -> Callable[[Path, bytes], Any]:
    def load(folder: Path, data: bytes) -> None:
        says = {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(says))
        (folder / "own.py").write_bytes(data)
        (folder / name).write_bytes(data)
        load_tokenizer(str(folder))

    return load


def processor(folder: Path, data: bytes) -> None:
    says = {
        "image_processor_type": "OwnProcessor",
        "auto_map": {"AutoImageProcessor": "own.OwnProcessor"},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(says))
    (folder / "own.py").write_bytes(data)
    folder_pixels(folder)


def sentences(folder: Path, data: bytes) -> None:
    """Modules by the path of their class: own.Own would be imported."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Own", "type": "own.Own"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "own.py").write_bytes(data)
    read_sentence_folder(folder)


def dense(folder: Path, data: bytes) -> None:
    says = {"in_features": 2, "out_features": 2, "activation_function": "os.system"}
    (folder / "config.json").write_text(json.dumps(says))
    (folder / "model.safetensors").write_bytes(data)
    try:
        load_maps((folder,))
    except TrainerError:
        says["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "config.json").write_text(json.dumps(says))
        load_maps((folder,))


def exported(folder: Path, data: bytes) -> None:
    from tests.models.small import small_config
    from trainer.export.native import NATIVE

    (folder / NATIVE).mkdir()
    (folder / NATIVE / "model.json").write_text(small_config().model_dump_json())
    (folder / NATIVE / "model.safetensors").write_bytes(data)
    load_exported(folder)


def vectors(folder: Path, data: bytes) -> None:
    (folder / "k.pth").write_bytes(data)
    VectorFiles(folder, name="t", vectors=1, dim=2).read(RawSample(1, "a.tar", "k", {}))


def member(suffix: str) -> Callable[[Path, bytes], Any]:
    def load(folder: Path, data: bytes) -> None:
        shard = write_members(folder / "a.tar", [(f"k.{suffix}", data)])
        write_index(shard)
        fields = ShardSet.open(shard).read(0).fields
        decode_image(fields.get("jpg", data), size=8, background=(0, 0, 0), max_pixels=10**6)

    return load


def caption(folder: Path, data: bytes) -> None:
    captions = DataConfig(train="x.tar", captions={"fields": ["name"]}).captions
    choose_caption({"json": data}, sample_id=1, epoch=0, seed=0, config=captions)


LOADED: dict[str, Callable[[Path, bytes], Any]] = {
    "a checkpoint's weights": checkpoint("weights"),
    "a checkpoint's state": checkpoint("state.json"),
    "a manifest": in_place(
        "step-00000001/manifest.json",
        lambda folder: Checkpointer(folder, Comm.solo()).latest(warn=lambda line: None),
    ),
    "a store's header": in_place("header.json", EmbeddingStore.open),
    "labels": in_place(
        "labels.npy",
        lambda f: (np.save(f / "ids.npy", np.arange(1)), ClusterLabels.open(f)),
    ),
    "ids of labels": in_place(
        "ids.npy", lambda f: (np.save(f / "labels.npy", np.arange(1)), ClusterLabels.open(f))
    ),
    "a catalogue": in_place("a.catalogue", lambda f: open_catalogue(str(f / "a.catalogue"))),
    "an index": in_place("a.tar.index", lambda f: read_index(str(f / "a.tar"))),
    "a shard": in_place("a.tar", lambda f: write_index(str(f / "a.tar"))),
    "a table": in_place("a.parquet", lambda f: write_index(str(f / "a.parquet"))),
    "shares of a selection": in_place("a.npy", lambda f: read_shares(f, "a")),
    "generated captions": in_place("captions.json", read_generated),
    "a run file": in_place("run.yaml", lambda f: load_run(f / "run.yaml")),
    "what is left out": in_place("left_out.json", lambda f: read_left_out(f, Comm.solo())),
    "a tokenizer": tokenizer("tokenizer.json"),
    "a tokenizer's words": tokenizer("vocab.txt"),
    "a model's weights": weights("model.safetensors"),
    "a pickle of weights": weights("pytorch_model.bin"),
    "a GGUF of weights": weights("model.gguf"),
    "a model of its own kind": own_kind,
    "a kernel of a hub": kernel,
    "an image processor": processor,
    "a sentence model's modules": sentences,
    "a sentence model's map": dense,
    "an exported model": exported,
    "a teacher's vectors": vectors,
    "a member called pyd": member("pyd"),
    "a member called pkl": member("pkl"),
    "a member called jpg": member("jpg"),
    "a caption": caption,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADED)
def test_no_payload_runs_and_each_is_a_sentence(tmp_path: Path, kind: str) -> None:
    for number, (name, make) in enumerate(BYTES.items()):
        folder, mark = tmp_path / str(number), tmp_path / "mark"
        folder.mkdir()
        said = ""
        try:
            LOADED[kind](folder, make(mark))
        except (TrainerError, BadSample) as error:
            said = str(error)
        assert not mark.exists(), name
        assert said, f"{kind} that is {name} was loaded"
        assert "\n" not in said
        assert len(said) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.mkdir [{mark}]",
        "!!python/object/new:os.mkdir {{args: [{mark}]}}",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nworkdir: !!python/name:os.mkdir",
        "steps: ${{oc.env:HOME}}",
        "steps: !include {mark}",
    ],
)
def test_no_tag_of_a_run_file_is_followed(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(TrainerError):
        parse_run(text.format(mark=mark))
    assert not mark.exists()


def test_no_member_is_written_anywhere(tmp_path: Path) -> None:
    """Links out of the archive and files through them; names that lead out of it."""
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for number, (name, link) in enumerate(
        [
            ("../out.txt", ""),
            (f"{tmp_path}/out.txt", ""),
            ("a/../../out.txt", ""),
            ("here", ".."),
            ("here", str(tmp_path)),
        ]
    ):
        shard = inside / f"{number}.tar"
        with tarfile.open(shard, "w") as archive:
            if link:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, link
                archive.addfile(info)
            file = tarfile.TarInfo(f"{name}/out.txt" if link else name)
            file.size = 1
            archive.addfile(file, io.BytesIO(b"x"))
        if link:
            write_index(str(shard))
            ShardSet.open(str(shard)).read(0)
        else:
            with pytest.raises(TrainerError, match="points outside"):
                write_index(str(shard))
    new = set(tmp_path.rglob("*")) - set(before)
    assert {path.suffix for path in new} == {".tar", ".index"}
