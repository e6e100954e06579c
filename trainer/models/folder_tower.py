"""Towers that transformers loads from a folder, looked at before they are trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from trainer.data.tokenize import sides_of, tokenize
from trainer.errors import ConfigError
from trainer.models.config import ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.fitting import (
    check_image_size,
    check_length,
    check_row,
    refuse_text_pooling,
    refuse_words,
)
from trainer.models.folder import RAISED, Loaded, load_folder
from trainer.models.inspection import (
    Reach,
    Sight,
    hold_unread,
    inspect_images,
    inspect_text,
    leave_out_head,
)
from trainer.models.lora import add_lora
from trainer.models.pools import image_pools, is_causal, text_pools
from trainer.models.projection import projection_of
from trainer.models.sentence_folder import SentenceFolder, read_sentence_folder
from trainer.models.tower import PairScales, Pool, Tower

_CLOSE = 1e-3
_PROBE_TEXT = "a red apple"


def loaded_image_tower(config: ModelConfig, path: str) -> Tower:
    began, section = time.perf_counter(), config.image
    refuse_text_pooling(section)
    loaded = load_folder(path, part="image", is_tower=True)
    check_image_size(loaded.backbone, config)
    learns = section.trained and section.lora is None
    sight = inspect_images(
        *(loaded.backbone, path),
        size=config.image_size,
        trained=learns,
        of_pair=loaded.pair is not None,
    )
    pixels = torch.rand(2, 3, config.image_size, config.image_size, generator=_generator())

    def tower(pool: Pool) -> Tower:
        projection = projection_of(section, "image", config.embed_dim, sight.width, loaded)
        return Tower(loaded.backbone, projection, pool=pool, trained=section.trained)

    def features(pair: Any) -> Any:
        return pair.get_image_features(pixel_values=pixels)

    built = _like_the_pair(
        [tower(pool) for pool in image_pools(section, loaded, sight, path)],
        lambda built: built.images(pixels),
        features if section.pooling == "auto" and section.projection == "auto" else None,
        loaded,
        path,
    )
    return _finished(
        built, section, "image", loaded, lambda: built.images(pixels[:1]), began, learns=learns
    )


def loaded_text_tower(
    config: TwoTowerConfig, path: str, tokenizer: PreTrainedTokenizerFast
) -> Tower:
    began, section = time.perf_counter(), config.text
    words = read_sentence_folder(path)
    refuse_words(words, path)
    folder = path if words.pooling is None else str(words.model)
    loaded = load_folder(folder, part="text", is_tower=True)
    if loaded.is_decoded:
        raise ConfigError(f"{path} is an encoder-decoder; a tower is one of the two")
    reach = inspect_text(
        *(loaded.backbone, tokenizer, path),
        length=config.text_length,
        of_pair=loaded.pair is not None,
    )
    check_length(reach, config.text_length, path)
    check_row(reach, config.text_length, path)
    rows = tokenize(tokenizer, [_PROBE_TEXT], length=config.text_length)

    def tower(pool: Pool) -> Tower:
        return Tower(
            loaded.backbone,
            projection_of(section, "text", config.embed_dim, reach.width, loaded),
            pool=pool,
            trained=section.trained,
            causal=is_causal(loaded.backbone) or reach.fills,
            eos_token_id=tokenizer.eos_token_id,
        )

    def features(pair: Any) -> Any:
        return _text_features(pair, rows, reach)

    built = _like_the_pair(
        [tower(pool) for pool in text_pools(section, loaded, reach, words)],
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
            projection_of(section, "image", dim, sight.width, kept),
            pool=pool,
            trained=False,
        )
        for pool in image_pools(section, kept, sight, path)
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
            projection_of(section, "text", dim, reach.width, kept),
            pool=pool,
            trained=False,
            causal=is_causal(kept.backbone) or reach.fills,
            eos_token_id=tokenizer.eos_token_id,
        )
        for pool in text_pools(section, kept, reach, SentenceFolder(Path(path)))
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
    kind = type(loaded.pair).__name__
    with torch.no_grad():
        try:
            found = features(loaded.pair)
        except RAISED as error:
            raise ConfigError(f"{path}: {kind} gives no features: {error}") from error
        wanted = found if isinstance(found, Tensor) else found.pooler_output
        if not wanted.isfinite().all():
            raise ConfigError(f"{path}: the features of {kind} are no numbers; its weights are bad")
        for tower in towers:
            said = embed(tower)
            if said.shape == wanted.shape and _near(said, wanted):
                return tower
    raise ConfigError(
        f"{path}: how {kind} pools isn't known: none of "
        f"{', '.join(tower.pool for tower in towers)} gives its own features (is its end token "
        "the tokenizer's?); set pooling yourself"
    )


def _near(said: Tensor, wanted: Tensor) -> bool:
    return bool((said - wanted).norm() <= _CLOSE * wanted.norm())


def pair_scales(loaded: Loaded) -> PairScales | None:
    """What a pair multiplies and shifts its cosines by; None where it says no scale."""
    scale = getattr(loaded.pair, "logit_scale", None)
    if not isinstance(scale, Tensor):
        return None
    bias = getattr(loaded.pair, "logit_bias", None)
    return PairScales(
        float(scale.detach().exp()), float(bias.detach()) if isinstance(bias, Tensor) else None
    )


def said_otherwise(tokenizer: PreTrainedTokenizerFast) -> str:
    """What the saved tokenizer would do to long texts that is not done, if anything."""
    if sides_of(tokenizer).get("truncation_side") != "left":
        return ""
    return "; long texts lose their end, though the tokenizer was saved to cut their beginning"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
