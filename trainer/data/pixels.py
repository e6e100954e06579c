"""How an image file becomes the input of a model, as the folder of the model says.

transformers writes it to preprocessor_config.json, or into processor_config.json. What stands
there is carried out here on decoded images, and compared once with the folder's own processor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.data.colour import Three
from trainer.data.decode import LONGEST, decode_image, decode_whole
from trainer.data.views import IMAGE_MEAN, IMAGE_STD, normalize
from trainer.errors import ConfigError

FILES = ("preprocessor_config.json", "processor_config.json")
_BICUBIC = int(Image.Resampling.BICUBIC)
_BILINEAR = int(Image.Resampling.BILINEAR)
_BYTE = 1 / 255
_PROBE_SHAPE = (83, 131, 3)
_CONVNEXT_WHOLE = 384
"""From this size on ConvNeXt's processor squeezes the image instead of cropping it."""
_KEYS = {"do_resize", "size", "do_rescale", "do_normalize", "image_mean", "image_std"}


@dataclass(frozen=True)
class Pixels:
    """Resize, crop to a square, scale, normalise. The defaults are CLIP's."""

    size: int
    """Pixels of a side of what the model sees."""
    mean: Three = IMAGE_MEAN
    """Of the scaled values, by channel."""
    deviation: Three = IMAGE_STD
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels."""
    fit: Literal["centre", "shortest", "square"] = "centre"
    """`shortest`: its shorter side becomes `edge` pixels, then the centre is cropped. `square`:
    both sides do, whatever the shape was. `centre`: `shortest` with an edge of `size`, in one
    resampling of the centred square."""
    edge: int | None = None
    """Pixels, before cropping; `size` where None."""
    resample: int = _BICUBIC
    """Pillow's number of the filter."""
    scale: float = _BYTE
    """Of the bytes, before the mean is taken off."""

    def decode(self, data: bytes, *, max_pixels: int) -> UInt8[Tensor, "3 size size"]:
        """The bytes of one image file; BadSample where it can't be decoded."""
        if self.fit == "centre":
            return decode_image(
                data, size=self.size, background=self.background, max_pixels=max_pixels
            )
        image = decode_whole(data, background=self.background, max_pixels=max_pixels)
        return self.arranged(image)

    def arranged(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """An RGB image, resized and cropped. What is missing at the edges of a crop is black."""
        edge = self.edge or self.size
        width, height = image.size
        if self.fit == "square":
            wanted = edge, edge
        else:
            short = min(width, height)
            wanted = int(edge * width / short), int(edge * height / short)
            if max(wanted) > LONGEST * edge:  # the whole would not fit into memory
                half, box = LONGEST * short // 2, (width // 2, height // 2)
                image = image.crop(
                    (
                        max(0, box[0] - half),
                        max(0, box[1] - half),
                        min(width, box[0] + half),
                        min(height, box[1] + half),
                    )
                )
                wanted = tuple(int(edge * side / short) for side in image.size)  # type: ignore[assignment]
        image = image.resize(wanted, Image.Resampling(self.resample))
        left, top = (wanted[0] - self.size) // 2, (wanted[1] - self.size) // 2
        if left or top:
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalized(
        self, images: UInt8[Tensor, "batch 3 size size"]
    ) -> Float32[Tensor, "batch 3 size size"]:
        """(scale * bytes - mean) / deviation."""
        return normalize(images, mean=self.unit_mean, deviation=self.unit_deviation)

    @property
    def unit_mean(self) -> Three:
        """Of pixels between 0 and 1, whatever the scale of the bytes is."""
        return self._of_unit(self.mean)

    @property
    def unit_deviation(self) -> Three:
        return self._of_unit(self.deviation)

    def _of_unit(self, values: Three) -> Three:
        if self.scale == _BYTE:
            return values
        first, second, third = (value / (255 * self.scale) for value in values)
        return first, second, third

    def resized(self, size: int) -> Pixels:
        """The same for a model that is to see `size` pixels: all lengths change in proportion."""
        edge = None if self.edge is None else round(self.edge * size / self.size)
        return replace(self, size=size, edge=edge)

    @property
    def text(self) -> str:
        """For the identity of vectors."""
        mean, deviation = (
            ",".join(f"{value:.6g}" for value in values) for values in (self.mean, self.deviation)
        )
        shape = "" if self.fit == "centre" else f", {self.fit} {self.edge or self.size} px"
        filtered = "" if self.resample == _BICUBIC else f", filter {self.resample}"
        scaled = "" if self.scale == _BYTE else f", times {self.scale:.6g}"
        return (
            f"{self.size} px, mean {mean}, deviation {deviation}, background {self.background}"
            f"{shape}{filtered}{scaled}"
        )

    def processor(self) -> Any:
        """An image processor of transformers that does the same to an RGB image."""
        edge = self.edge or self.size
        square = {"height": edge, "width": edge}
        return CLIPImageProcessorPil(
            size=square if self.fit == "square" else {"shortest_edge": edge},
            crop_size={"height": self.size, "width": self.size},
            resample=self.resample,
            rescale_factor=self.scale,
            image_mean=list(self.mean),
            image_std=list(self.deviation),
        )


def folder_pixels(
    folder: Path | str,
    *,
    size: int | None = None,
    unsaid: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Pixels | None:
    """What a model's folder says about its pixels; None where it says nothing.

    `size` is what the model is to see, where that is not what the folder says, and `unsaid` where
    it says none. ConfigError where the folder wants something else than resizing, a square crop,
    scaling and normalisation.
    """
    folder = Path(folder)
    if not any(_speaks(folder / name) for name in FILES):
        return None
    processor, values = _processor(folder)
    pixels = _understood(values, folder, background)
    if processor is not None:
        _compare(pixels, processor, folder)
    if size is None and not {"size", "crop_size"} & _file(folder).keys():
        size = unsaid
    return pixels if size is None else pixels.resized(size)


def _speaks(path: Path) -> bool:
    """Whether a file says something about images (a text model's processor_config does not)."""
    if not path.exists():
        return False
    values = _json(path)
    return path.name == FILES[0] or "image_processor" in values


def _processor(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The folder's own processor and its settings; no processor where it needs torchvision."""
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        return processor, processor.to_dict()
    except ImportError:
        return None, _written(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"transformers can't load an image processor from {folder}: {reason[:240]}"
        ) from error


def _written(folder: Path) -> dict[str, Any]:
    """As the file has them: a class that only torchvision can run gives no defaults."""
    values = _file(folder)
    if missing := sorted(_KEYS - values.keys()):
        raise ConfigError(
            f"the image processor of {folder} does not say {', '.join(missing)}, and its class "
            "can't be run here to ask it; write them into the file"
        )
    return values


def _file(folder: Path) -> dict[str, Any]:
    """What the first of its files says about images."""
    values = _json(next(folder / name for name in FILES if _speaks(folder / name)))
    return dict(values.get("image_processor", values))


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values


def _understood(values: dict[str, Any], folder: Path, background: tuple[int, int, int]) -> Pixels:
    fit, edge = _resizing(values, folder)
    crop = (
        _side(values.get("crop_size"), "crop_size", folder)
        if values.get("do_center_crop")
        else None
    )
    if fit == "shortest" and (share := values.get("crop_pct")):
        fit, edge, crop = _convnext(edge, float(share))
    if fit == "shortest" and crop is None:
        raise ConfigError(
            f"{folder} resizes the shorter side to {edge} and crops nothing, so its images have "
            "several shapes; a batch needs one: set do_center_crop and crop_size in its processor"
        )
    normal = bool(values.get("do_normalize"))
    return Pixels(
        size=crop or edge,
        mean=_three(values, "image_mean", folder) if normal else (0.0, 0.0, 0.0),
        deviation=_three(values, "image_std", folder) if normal else (1.0, 1.0, 1.0),
        background=background,
        fit=fit,
        edge=edge,
        resample=_BILINEAR if (found := values.get("resample")) is None else int(found),
        scale=float(values.get("rescale_factor") or _BYTE) if values.get("do_rescale") else 1.0,
    )


def _resizing(values: dict[str, Any], folder: Path) -> tuple[Literal["shortest", "square"], int]:
    if not values.get("do_resize"):
        raise ConfigError(
            f"{folder} says do_resize: false; images of a batch need one size, so set do_resize "
            "and size in its processor"
        )
    size = values.get("size")
    if isinstance(size, dict) and set(_said(size)) == {"shortest_edge"}:
        return "shortest", int(size["shortest_edge"])
    return "square", _side(size, "size", folder)


def _convnext(edge: int, share: float) -> tuple[Literal["shortest", "square"], int, int]:
    """Of `crop_pct`: an edge larger by it, then the crop; large images are squeezed whole."""
    if edge >= _CONVNEXT_WHOLE:
        return "square", edge, edge
    return "shortest", int(edge / share), edge


def _side(size: Any, key: str, folder: Path) -> int:
    """Of a square given as a number or by height and width."""
    if isinstance(size, int):
        return size
    sides = _said(size) if isinstance(size, dict) else {}
    if set(sides) == {"height", "width"} and sides["height"] == sides["width"]:
        return int(sides["height"])
    raise ConfigError(f"{folder} wants images of {key} {size}; only squares can be trained on")


def _said(size: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in size.items() if value is not None}


def _three(values: dict[str, Any], key: str, folder: Path) -> Three:
    found = values.get(key)
    numbers = [found] * 3 if isinstance(found, int | float) else list(found or ())
    if len(numbers) != 3:
        raise ConfigError(f"{folder} has {key} {found}; images have three channels")
    first, second, third = (float(number) for number in numbers)
    return first, second, third


def _compare(pixels: Pixels, processor: Any, folder: Path) -> None:
    """ConfigError where the folder's own processor makes something else of an image."""
    noise = torch.randint(
        256, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    image = Image.fromarray(noise.numpy())
    kind = type(processor).__name__
    try:
        theirs = torch.as_tensor(np.array(processor(image)["pixel_values"][0]))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder}: its {kind} gives no pixel_values: {error!r}") from error
    ours = pixels.normalized(pixels.arranged(image)[None])[0]
    step = pixels.scale / min(pixels.deviation)  # one byte of rounding
    if theirs.shape != ours.shape or float((theirs - ours).abs().max()) > 1.01 * step:
        raise ConfigError(
            f"{folder}: its {kind} does more to an image than resize, crop, scale and normalise "
            f"(it gives {tuple(theirs.shape)}), which is not known here"
        )
