"""Towers: CLIP transformers built by size, or whatever transformers loads from a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from trainer.data.pixels import Pixels, folder_pixels
from trainer.data.tokenize import sides_of, tokenize
from trainer.errors import ConfigError
from trainer.models.config import ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.folder import RAISED, Loaded, load_folder, local_folder
from trainer.models.inspection import (
    Reach,
    Sight,
    hold_unread,
    inspect_images,
    inspect_text,
    leave_out_head,
)
from trainer.models.lora import add_lora
from trainer.models.sentence_folder import SentenceFolder, read_sentence_folder
from trainer.models.tower import PairScales, Pool, Tower

ATTENTION = "sdpa"
WHITE = (255, 255, 255)
_CLOSE = 1e-3
_PROBE_TEXT = "a red apple"


def image_tower(config: ModelConfig) -> Tower:
    """The image encoder that `config.image` describes."""
    section = config.image
    if section.path is not None:
        return _loaded_image_tower(config, local_folder(section.path))
    backbone: Any = CLIPVisionModel._from_config(
        _vision_config(config), attn_implementation=ATTENTION
    )
    projection = new_projection(section.width, config.embed_dim)
    pool: Pool = "mean" if section.pooling == "mean" else "clip"
    _refuse_text_pooling(section)
    return Tower(backbone, projection, pool=pool, trained=section.trained)


def text_tower(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> Tower:
    """The text encoder that `config.text` describes, for the ids of `tokenizer`."""
    section = config.text
    if section.path is not None:
        return _loaded_text_tower(config, local_folder(section.path), tokenizer)
    backbone: Any = CLIPTextModel._from_config(
        _text_config(config, tokenizer), attn_implementation=ATTENTION
    )
    projection = new_projection(section.width, config.embed_dim)
    pool: Pool = "eos" if section.pooling == "auto" else section.pooling
    return Tower(
        backbone,
        projection,
        pool=pool,
        trained=section.trained,
        causal=True,
        eos_token_id=tokenizer.eos_token_id,
    )


@lru_cache(maxsize=16)
def _folder_pixels(path: str, size: int, background: tuple[int, int, int]) -> Pixels | None:
    return folder_pixels(local_folder(path), size=size, background=background)


def model_pixels(config: ModelConfig, background: tuple[int, int, int] = WHITE) -> Pixels:
    """How images become the input of the image tower: as its folder says, else as for CLIP."""
    path, size = config.image.path, config.image_size
    said = None if path is None else _folder_pixels(path, size, background)
    return said or Pixels(size, background=background)


def pixels_note(config: ModelConfig, path: str) -> str:
    """For people: what was decided about a loaded tower's images."""
    said = _folder_pixels(path, config.image_size, WHITE)
    if said is None:
        return f"images: {path} has no image processor, so they are prepared as for CLIP"
    own = folder_pixels(local_folder(path))
    assert own is not None
    other = "" if own.size == config.image_size else f", made for {own.size} px"
    return f"images: as the processor of {path} says{other}: {said.text}"


def new_projection(width: int | None, embed_dim: int) -> nn.Linear:
    """Into the shared space, with CLIP's initialisation."""
    assert width is not None
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _loaded_image_tower(config: ModelConfig, path: str) -> Tower:
    began, section = time.perf_counter(), config.image
    _refuse_text_pooling(section)
    loaded = load_folder(path, part="image")
    _check_image_size(loaded.backbone, config)
    learns = section.trained and section.lora is None
    sight = inspect_images(loaded.backbone, path, size=config.image_size, trained=learns)
    pixels = torch.rand(2, 3, config.image_size, config.image_size, generator=_generator())

    def tower(pool: Pool) -> Tower:
        projection = _projection(section, "image", config.embed_dim, sight.width, loaded)
        return Tower(loaded.backbone, projection, pool=pool, trained=section.trained)

    def features(pair: Any) -> Any:
        return pair.get_image_features(pixel_values=pixels)

    built = _like_the_pair(
        [tower(pool) for pool in _image_pools(section, loaded, sight, path)],
        lambda built: built.images(pixels),
        features if section.pooling == "auto" and section.projection == "auto" else None,
        loaded,
        path,
    )
    return _finished(
        built, section, "image", loaded, lambda: built.images(pixels[:1]), began, learns=learns
    )


def _loaded_text_tower(
    config: TwoTowerConfig, path: str, tokenizer: PreTrainedTokenizerFast
) -> Tower:
    began, section = time.perf_counter(), config.text
    words = read_sentence_folder(path)
    _refuse_words(words, path)
    loaded = load_folder(path if words.pooling is None else str(words.model), part="text")
    if loaded.is_decoded:
        raise ConfigError(f"{path} is an encoder-decoder; a tower is one of the two")
    reach = inspect_text(loaded.backbone, tokenizer, path, length=config.text_length)
    check_length(reach, config.text_length, path)
    _check_row(reach, config.text_length, path)
    rows = tokenize(tokenizer, [_PROBE_TEXT], length=config.text_length)

    def tower(pool: Pool) -> Tower:
        return Tower(
            loaded.backbone,
            _projection(section, "text", config.embed_dim, reach.width, loaded),
            pool=pool,
            trained=section.trained,
            causal=is_causal(loaded.backbone) or reach.fills,
            eos_token_id=tokenizer.eos_token_id,
        )

    def features(pair: Any) -> Any:
        return _text_features(pair, rows, reach)

    built = _like_the_pair(
        [tower(pool) for pool in _text_pools(section, loaded, reach, words)],
        lambda built: built.texts(*rows),
        features if section.pooling == "auto" and section.projection == "auto" else None,
        loaded,
        path,
    )
    learns = section.trained and section.lora is None
    finished = _finished(
        built, section, "text", loaded, lambda: built.texts(*rows), began, learns=learns
    )
    finished.note += said_otherwise(tokenizer)
    return finished


def own_image_tower(loaded: Loaded, sight: Sight, path: str, *, size: int) -> Tower:
    """A frozen tower that says of an image what the folder's model says by itself."""
    kept = loaded if loaded.projection is not None else loaded._replace(projection=nn.Identity())
    section = TowerConfig(path=path, trained=False)
    dim = getattr(kept.projection, "out_features", sight.width)
    weight = next(kept.backbone.parameters())
    pixels = torch.rand(2, 3, size, size, generator=_generator()).to(weight.dtype)
    towers = [
        Tower(
            kept.backbone,
            _projection(section, "image", dim, sight.width, kept),
            pool=pool,
            trained=False,
        )
        for pool in _image_pools(section, kept, sight, path)
    ]
    return _like_the_pair(
        towers,
        lambda built: built.images(pixels),
        lambda pair: pair.get_image_features(pixel_values=pixels),
        kept,
        path,
    )


def own_text_tower(
    loaded: Loaded,
    reach: Reach,
    tokenizer: PreTrainedTokenizerFast,
    path: str,
    *,
    length: int,
) -> Tower:
    """A frozen tower that says of a text what the folder's model says by itself."""
    kept = loaded if loaded.projection is not None else loaded._replace(projection=nn.Identity())
    section = TowerConfig(path=path, trained=False)
    dim = getattr(kept.projection, "out_features", reach.width)
    rows = tokenize(tokenizer, [_PROBE_TEXT], length=length)
    towers = [
        Tower(
            kept.backbone,
            _projection(section, "text", dim, reach.width, kept),
            pool=pool,
            trained=False,
            causal=is_causal(kept.backbone) or reach.fills,
            eos_token_id=tokenizer.eos_token_id,
        )
        for pool in _text_pools(section, kept, reach, SentenceFolder(Path(path)))
    ]
    return _like_the_pair(
        towers,
        lambda built: built.texts(*rows),
        lambda pair: _text_features(pair, rows, reach),
        kept,
        path,
    )


def _text_features(pair: Any, rows: tuple[Tensor, Tensor], reach: Reach) -> Any:
    mask = None if reach.fills else rows[1].long()
    return pair.get_text_features(input_ids=rows[0], attention_mask=mask)


def _finished(
    tower: Tower,
    section: TowerConfig,
    part: str,
    loaded: Loaded,
    probe: Callable[[], Tensor],
    began: float,
    *,
    learns: bool,
) -> Tower:
    """The tower with nothing in it that would learn without a gradient, and with its note."""
    if tower.pool not in ("clip", "own"):
        leave_out_head(tower.backbone)
    if learns:
        hold_unread(tower.backbone, probe)
    if section.lora:
        add_lora(tower.backbone, section.lora)
    tower.pair = pair_scales(loaded)
    mapped = {
        "Identity": "no projection",
        "Linear": "the projection at its path"
        if loaded.projection is tower.projection
        else "a new projection",
    }[type(tower.projection).__name__]
    tower.note = (
        f"{part} tower: {type(tower.backbone).__name__} of {section.path}, pooling {tower.pool}, "
        f"{mapped}; loaded and looked at in {time.perf_counter() - began:.1f} s"
    )
    return tower


def _like_the_pair(
    towers: Sequence[Tower],
    embed: Callable[[Tower], Tensor],
    features: Callable[[Any], Any] | None,
    loaded: Loaded,
    path: str,
) -> Tower:
    """The first tower; of a pair's, the first that says what the pair says."""
    if features is None or loaded.pair is None:
        return towers[0]
    with torch.no_grad():
        try:
            found = features(loaded.pair)
        except RAISED as error:
            raise ConfigError(f"{path}: {_kind(loaded.pair)} gives no features: {error}") from error
        wanted = found if isinstance(found, Tensor) else found.pooler_output
        for tower in towers:
            said = embed(tower)
            if said.shape == wanted.shape and _near(said, wanted):
                return tower
    raise ConfigError(
        f"{path}: how {_kind(loaded.pair)} pools isn't known: none of "
        f"{', '.join(tower.pool for tower in towers)} gives its own features (is its end token "
        "the tokenizer's?); set pooling yourself"
    )


def _near(said: Tensor, wanted: Tensor) -> bool:
    return bool((said - wanted).norm() <= _CLOSE * wanted.norm())


def _projection(
    section: TowerConfig, name: str, embed_dim: int, width: int, loaded: Loaded
) -> nn.Module:
    """The folder's own where it has one, which must fit; else as the section says."""
    own, wanted = loaded.projection, section.projection
    if wanted == "new" or (wanted == "auto" and own is None):
        return new_projection(width, embed_dim)
    gives = own.out_features if wanted == "auto" and isinstance(own, nn.Linear) else width
    if gives != embed_dim:
        what = "projection gives" if isinstance(own, nn.Linear) else "pooled state has"
        raise ConfigError(
            f"{section.path}: its {what} {gives} numbers, but embed_dim is {embed_dim}; set "
            f"model.embed_dim={gives}, or model.{name}.projection=new to train another"
        )
    return nn.Identity() if wanted == "none" else cast(nn.Module, own)


def pair_scales(loaded: Loaded) -> PairScales | None:
    """What a pair multiplies and shifts its cosines by; None where it says no scale."""
    scale = getattr(loaded.pair, "logit_scale", None)
    if not isinstance(scale, Tensor):
        return None
    bias = getattr(loaded.pair, "logit_bias", None)
    return PairScales(
        float(scale.detach().exp()), float(bias.detach()) if isinstance(bias, Tensor) else None
    )


def _vision_config(config: ModelConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **_sizes(config.image),
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.embed_dim,
    )


def _text_config(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        **_sizes(config.text),
        vocab_size=len(tokenizer),
        max_position_embeddings=config.text_length,
        projection_dim=config.embed_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _sizes(section: TowerConfig) -> dict[str, Any]:
    assert section.width is not None
    return {
        "hidden_size": section.width,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "intermediate_size": section.mlp_width or 4 * section.width,
        "hidden_act": section.activation,
    }


def _check_image_size(backbone: Any, config: ModelConfig) -> None:
    patch, size, path = _patch_of(backbone), config.image_size, config.image.path
    if config.patch_size is not None and config.patch_size != patch:
        cuts = "has no patches of one size" if patch is None else f"has patches of {patch}"
        raise ConfigError(
            f"patch_size is {config.patch_size}, but {path} {cuts}; drop model.patch_size"
        )
    if patch is not None and size % patch:
        lower = max(patch, size // patch * patch)
        raise ConfigError(
            f"image_size is {size}, but {path} cuts images into patches of {patch}; "
            f"set model.image_size={lower} or {lower + patch}"
        )


def _patch_of(backbone: Any) -> int | None:
    """Pixels of a side of a patch, where there are square ones."""
    said = getattr(backbone.config, "patch_size", None)
    sides = set(said) if isinstance(said, list | tuple) else {said}
    side = sides.pop()
    return side if isinstance(side, int) and not sides else None


def check_length(reach: Reach, length: int, path: str) -> None:
    """ConfigError where a row is longer than the model reads."""
    if reach.longest is not None:
        raise ConfigError(
            f"text_length is {length}, but {path} reads at most {reach.longest} tokens; "
            f"set model.text_length={reach.longest}"
        )


def _check_row(reach: Reach, length: int, path: str) -> None:
    if reach.fills and reach.row != length:
        raise ConfigError(
            f"{path} pools at the end of rows that are filled up to {reach.row} tokens, but "
            f"text_length is {length}; set model.text_length={reach.row}"
        )


def _refuse_words(words: SentenceFolder, path: str) -> None:
    """ConfigError where a folder wants of a tower what only a teacher does."""
    if words.maps:
        raise ConfigError(
            f"{path} has maps behind its pooling ({', '.join(place.name for place in words.maps)}"
            "), which a tower does not carry on; use it as a teacher"
        )
    if words.prompt:
        raise ConfigError(
            f"{path} puts {words.prompt!r} before every text, which a tower does not; use it as a "
            "teacher, or take default_prompt_name out of its config_sentence_transformers.json"
        )


def _refuse_text_pooling(section: TowerConfig) -> None:
    if section.pooling in ("eos", "last"):
        raise ConfigError(
            f"image.pooling is {section.pooling}, which is for texts; use mean or cls"
        )


def _image_pools(section: TowerConfig, loaded: Loaded, sight: Sight, path: str) -> list[Pool]:
    """What may be meant, the likeliest first."""
    if section.pooling == "cls" and not sight.has_class_token:
        raise ConfigError(
            f"image.pooling is cls, but {_kind(loaded.backbone)} of {path} has no class token; "
            "use auto or mean"
        )
    if isinstance(loaded.backbone, CLIPVisionModel) and section.pooling in ("auto", "cls"):
        return ["clip"]
    if section.pooling != "auto":
        return [cast(Pool, section.pooling)]
    found: list[Pool] = ["own"] if sight.pools else []
    return [*found, *(["cls"] if sight.has_class_token else []), "mean"]  # type: ignore[list-item]


def _text_pools(
    section: TowerConfig, loaded: Loaded, reach: Reach, words: SentenceFolder
) -> list[Pool]:
    """`auto`: the folder's word, end of text for CLIP, the model's own, the last token of causal
    models, the mean of encoders."""
    if section.pooling != "auto":
        return [section.pooling]
    if words.pooling is not None:
        return [words.pooling]
    if isinstance(loaded.backbone, CLIPTextModel):
        return ["eos"]
    first: Pool = "last" if is_causal(loaded.backbone) else "mean"
    own: list[Pool] = ["own"] if reach.pools else []
    return [*own, first] if loaded.pair is None else [*own, "cls", "eos", "last", "mean"]


def is_causal(backbone: Any) -> bool:
    """Whether a token sees only those before it."""
    if isinstance(backbone, CLIPTextModel):
        return True
    return is_causal_kind(backbone.config)


def is_causal_kind(settings: Any) -> bool:
    """Whether a configuration is of a model that says next words."""
    both_ways = settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(
        settings, "use_bidirectional_attention", False
    )
    return settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both_ways


def said_otherwise(tokenizer: PreTrainedTokenizerFast) -> str:
    """What the saved tokenizer would do to long texts that is not done, if anything."""
    if sides_of(tokenizer).get("truncation_side") != "left":
        return ""
    return "; long texts lose their end, though the tokenizer was saved to cut their beginning"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _kind(model: Any) -> str:
    return type(model).__name__
