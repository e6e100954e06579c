"""Whether an exported folder gives the embeddings that the trainer computes, form by form."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.errors import CheckpointError
from trainer.export.native import Exportable, load_again
from trainer.export.onnx_files import ONNX
from trainer.export.open_clip_folder import CONFIG
from trainer.models.model import Model
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower
from trainer.types import Batch

TOLERANCE = 1e-5
"""Between two numbers of a unit vector: float32 rounds a few times 1e-7 in another order."""
PAIRS = ("CLIPModel", "SiglipModel")
"""Classes of transformers that hold both towers."""
IMAGE_ALONE = "CLIPVisionModelWithProjection"
APART = "towers apart"
WHAT = f"at most {TOLERANCE:.0e} between two numbers of a unit vector"
"""The measure of every line below, and its limit."""
_TEXTS = ("a", "red apple", "two cats on a sofa, seen from above")


class Compared(NamedTuple):
    """What one form gave on inputs that nobody has trained on."""

    form: str
    furthest: dict[str, float]
    """Largest difference between two numbers of an embedding, by modality."""
    skipped: str = ""
    """Why nothing was compared; empty where it was."""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.form}: not compared ({self.skipped})"
        said = ", ".join(f"{name} within {value:.1e}" for name, value in self.furthest.items())
        return f"{self.form}: {said} of the trainer's embeddings"


def compare_forms(
    model: Model, tokenizer: PreTrainedTokenizerFast | None, folder: Path, *, loads_as: str
) -> list[Compared]:
    """One line for each form in the folder. CheckpointError where one differs by more than 1e-5.

    Compared are unit vectors of random pictures and of a few texts, in float32 on the CPU.
    """
    assert isinstance(model, Exportable)
    batch = probe(model, tokenizer)
    truth = _by_itself(model, batch)
    found = list(_each_form(folder, model, batch, truth, loads_as=loads_as))
    for compared in found:
        worst = max(compared.furthest.values(), default=0.0)
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"the export in {folder} is wrong: {compared} ({WHAT}); do not use it, and report "
                "this"
            )
    return found


def probe(model: Exportable, tokenizer: PreTrainedTokenizerFast | None) -> Batch:
    """Random pixels and a few texts."""
    size = model.config.image_size
    pixels = torch.randn(len(_TEXTS), 3, size, size, generator=torch.Generator().manual_seed(7))
    device, ids = next(model.parameters()).device, torch.arange(len(_TEXTS))
    if not isinstance(model, TwoTower) or tokenizer is None:
        return Batch(pixels.to(device), None, None, ids)
    encoded = tokenizer(
        list(_TEXTS),
        padding="max_length",
        truncation=True,
        max_length=model.config.text_length,
        return_tensors="pt",
    )
    tokens, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    return Batch(
        pixels, tokens.to(pixels.device), mask.to(pixels.device), torch.arange(len(_TEXTS))
    )


def _each_form(
    folder: Path, model: Exportable, batch: Batch, truth: dict[str, Tensor], *, loads_as: str
) -> Iterator[Compared]:
    by: dict[str, Callable[[Path, Batch], dict[str, Tensor]]] = {
        **{name: partial(_by_pair, name) for name in PAIRS},
        IMAGE_ALONE: _by_image_model,
        APART: partial(_by_towers, model),
    }
    if loads_as in by:
        yield _compared(f"transformers {loads_as}", by[loads_as], folder, batch, truth)
    yield _compared("native", _by_native, folder, batch, truth)
    if (folder / CONFIG).exists():
        yield _compared("open_clip", _by_open_clip, folder, batch, truth, needs="open_clip")
    if (folder / ONNX).exists():
        yield _compared("onnxruntime", _by_onnx, folder, batch, truth, needs="onnxruntime")


def _compared(
    form: str,
    embed: Callable[[Path, Batch], dict[str, Tensor]],
    folder: Path,
    batch: Batch,
    truth: dict[str, Tensor],
    *,
    needs: str | None = None,
) -> Compared:
    if needs is not None and importlib.util.find_spec(needs) is None:
        return Compared(form, {}, f"{needs} is not installed")
    try:
        found = embed(folder, batch)
    except ImportError as error:
        return Compared(form, {}, f"{needs} can't be imported: {error}")
    furthest = {
        name: float((rows.float().cpu() - truth[name].float().cpu()).abs().max())
        for name, rows in found.items()
    }
    return Compared(form, furthest)


@torch.no_grad()
def _by_itself(model: Model, batch: Batch) -> dict[str, Tensor]:
    features = model(batch)
    found = {"image": features.image, "text": features.text}
    return {name: rows for name, rows in found.items() if rows is not None}


def _by_native(folder: Path, batch: Batch) -> dict[str, Tensor]:
    return _by_itself(load_again(folder), batch)


@torch.no_grad()
def _by_image_model(folder: Path, batch: Batch) -> dict[str, Tensor]:
    tower: Any = getattr(transformers, IMAGE_ALONE).from_pretrained(folder).eval()
    said = tower(pixel_values=batch.images).image_embeds
    return {"image": torch.nn.functional.normalize(said, dim=1)}


def _by_towers(model: Exportable, folder: Path, batch: Batch) -> dict[str, Tensor]:
    """Each as transformers loads it, behind the trainer's own pooling and projection."""
    towers = {"image": model.image}
    if isinstance(model, TwoTower):
        towers["text"] = model.text
    with ExitStack() as swapped:
        for name, tower in towers.items():
            swapped.enter_context(_with_backbone(tower, folder / name))
        return _by_itself(model, batch)


@contextmanager
def _with_backbone(tower: Tower, folder: Path) -> Iterator[None]:
    ours = tower.backbone
    dtype = next(ours.parameters()).dtype
    tower.backbone = type(ours).from_pretrained(folder, dtype=dtype).eval()
    try:
        yield
    finally:
        tower.backbone = ours


@torch.no_grad()
def _by_pair(loads_as: str, folder: Path, batch: Batch) -> dict[str, Tensor]:
    pair: Any = getattr(transformers, loads_as).from_pretrained(folder).eval()
    assert batch.images is not None
    assert batch.tokens is not None
    assert batch.token_mask is not None
    masked = loads_as == "CLIPModel"  # SigLIP reads rows that are filled up
    mask = {"attention_mask": batch.token_mask.long().cpu()} if masked else {}
    said = pair(pixel_values=batch.images.cpu(), input_ids=batch.tokens.cpu(), **mask)
    return {"image": said.image_embeds, "text": said.text_embeds}


@torch.no_grad()
def _by_open_clip(folder: Path, batch: Batch) -> dict[str, Tensor]:
    open_clip: Any = importlib.import_module("open_clip")
    model, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder.resolve()}")
    assert batch.images is not None
    assert batch.tokens is not None
    model.eval()
    return {
        "image": model.encode_image(batch.images.cpu(), normalize=True),
        "text": model.encode_text(batch.tokens.cpu(), normalize=True),
    }


def _by_onnx(folder: Path, batch: Batch) -> dict[str, Tensor]:
    runtime: Any = importlib.import_module("onnxruntime")
    given = {
        "image": {"pixels": batch.images},
        "text": {"tokens": batch.tokens, "mask": batch.token_mask},
    }
    found: dict[str, Tensor] = {}
    for name, inputs in given.items():
        path = folder / ONNX / f"{name}.onnx"
        if not path.exists():
            continue
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        arrays = {
            key: (value.long() if key == "mask" else value).cpu().numpy()
            for key, value in inputs.items()
            if value is not None
        }
        found[name] = torch.from_numpy(session.run(None, arrays)[0])
    return found
