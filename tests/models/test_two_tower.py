"""Two towers of random weights: what they compute, what they leave alone, what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import BartConfig, BartModel, ViTConfig, ViTModel

from tests.models.small import small_batch, small_config, texts, word_tokenizer
from trainer.errors import ConfigError
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.types import Batch

HALVES = ("layers", "attention_heads", "ffn_dim")
KINDS = ["clip", "llama", "bert"]
FIRST_LAYER = {
    "clip_vision_model": "layer_norm1",
    "clip_text_model": "layer_norm1",
    "llama": "input_layernorm",
    "bert": "attention",
}
"""What a block runs first: recomputation stops early, so only that is sure to run again."""


def build(kind: str, saved: dict[str, str], **changes: object) -> TwoTower:
    text = {} if kind == "clip" else {"text": {"path": saved[kind]}}
    return build_two_tower(small_config(**{**text, **changes}), word_tokenizer())


def text_only(tokens: Tensor, mask: Tensor) -> Batch:
    return Batch(None, tokens, mask, torch.arange(len(tokens)))


# -- configuration ------------------------------------------------------------------------------


def test_tiny_has_three_to_four_million_parameters() -> None:
    tokenizer = word_tokenizer()
    for config in (TwoTowerConfig(), TwoTowerConfig(head={})):
        counts = build_two_tower(config, tokenizer).count_parameters()
        missing_words = (config.vocabulary - len(tokenizer)) * 128
        assert 3_000_000 < counts["total"] + missing_words < 4_000_000
        assert counts["trained"] == counts["total"]


@pytest.mark.parametrize("changes", [{}, {"preset": "vit_l_14"}, {"head": {"layers": 2}}])
def test_a_resolved_configuration_reads_back_equal(changes: dict[str, object]) -> None:
    config = TwoTowerConfig.model_validate(changes)
    assert TwoTowerConfig.model_validate(config.model_dump()) == config
    assert TwoTowerConfig.model_validate_json(config.model_dump_json()) == config


def test_what_is_not_given_comes_from_the_preset() -> None:
    config = TwoTowerConfig.model_validate({"preset": "vit_b_32", "text": {"layers": 6}})
    assert (config.image.width, config.image.layers, config.image_size) == (768, 12, 224)
    assert (config.text.width, config.text.layers) == (512, 6)
    assert config.head is None
    assert TwoTowerConfig(head={"dim": 32}).head.hidden == TwoTowerConfig(head={}).head.hidden
    assert TwoTowerConfig(bias=True).initial_logit_scale == 10.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_size": 50}, "not divisible by patch_size 16; use 48 or 64"),
        ({"text": {"width": 102}}, "102 is not divisible by 4 heads"),
        ({"text": {"path": "somewhere", "width": 64}}, "path fixes the sizes; drop width"),
        ({"imagesize": 64}, "Extra inputs"),
        ({"preset": "huge"}, "preset"),
    ],
)
def test_mistakes_are_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TwoTowerConfig.model_validate(values)


# -- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_float32_unit_vectors_of_what_the_batch_has(
    kind: str, saved: dict[str, str]
) -> None:
    model = build(kind, saved, head={"hidden": 16, "dim": 8}, bias=True).eval()
    batch = small_batch()
    both = model(batch)
    images = model(batch._replace(tokens=None, token_mask=None))
    words = model(batch._replace(images=None))
    assert images.text is None
    assert images.text_projected is None
    assert words.image is None
    assert words.image_projected is None
    assert torch.equal(images.image, both.image)
    assert torch.equal(words.text_projected, both.text_projected)
    for rows in (both.image, both.text, both.image_projected, both.text_projected):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
    assert both.logit_scale.item() == pytest.approx(10.0)
    assert both.logit_bias.item() == pytest.approx(-10.0)
    assert both.prototype_scale.item() == pytest.approx(1 / 0.07)


def test_without_heads_and_bias_there_is_nothing_that_gets_no_gradient() -> None:
    model = build_two_tower(small_config(), word_tokenizer())
    features = model(small_batch())
    assert features.prototype_scale is None
    assert features.logit_bias is None
    (features.logit_scale * features.image * features.text).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["auto", "eos", "last", "mean", "cls"])
def test_pooling_equals_that_of_each_text_alone_without_padding(
    kind: str, pooling: str, saved: dict[str, str]
) -> None:
    text = {"width": 32, "layers": 2, "heads": 2} if kind == "clip" else {"path": saved[kind]}
    model = build(kind, saved, text={**text, "pooling": pooling}).eval()
    tokens, mask = texts([1, 5, 10, 3])
    batched = model(text_only(tokens, mask)).text
    wanted = {"auto": {"clip": "last", "llama": "last", "bert": "mean"}[kind], "eos": "last"}
    for row in range(4):
        alone = tokens[row : row + 1, : int(mask[row].sum())]
        states = model.text.backbone(input_ids=alone).last_hidden_state[0]
        pooled = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}
        embedding = model.text.projection(pooled[wanted.get(pooling, pooling)])
        expected = embedding / embedding.norm()
        torch.testing.assert_close(batched[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batch_mates_do_not_matter(kind: str, saved: dict[str, str]) -> None:
    model = build(kind, saved).eval()
    tokens, mask = texts([2, 9, 4, 1])
    together = model(text_only(tokens, mask)).text
    noise = torch.where(mask, tokens, torch.full_like(tokens, 1))  # 1 is the end token
    torch.testing.assert_close(model(text_only(noise, mask)).text, together, rtol=0, atol=1e-5)
    for row in range(4):
        alone = model(text_only(tokens[row : row + 1], mask[row : row + 1])).text[0]
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_an_image_tower_can_be_any_vision_transformer(pooling: str, tmp_path: Path) -> None:
    settings = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
    )
    ViTModel(settings).save_pretrained(tmp_path)
    config = small_config(image={"path": str(tmp_path), "pooling": pooling})
    model = build_two_tower(config, word_tokenizer())
    batch = small_batch()
    states = model.image.backbone(pixel_values=batch.images).last_hidden_state
    pooled = states[:, 0] if pooling == "auto" else states.mean(dim=1)
    expected = torch.nn.functional.normalize(model.image.projection(pooled))
    result = model(batch)
    torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-6)
    (result.image * result.text).sum().backward()
    assert all(p.grad is not None for p in model.image.parameters())
    with pytest.raises(ConfigError, match=r"set model.image_size=32"):
        build_two_tower(config.model_copy(update={"image_size": 48}), word_tokenizer())


def test_a_text_without_an_end_token_is_pooled_at_its_last_token() -> None:
    model = build_two_tower(small_config(), word_tokenizer()).eval()
    tokens, mask = texts([4])
    cut, cut_mask = tokens.clone(), mask.clone()
    end = int(mask.sum()) - 1
    cut[0, end], cut_mask[0, end] = 0, False
    states = model.text.backbone(input_ids=tokens[:, :end]).last_hidden_state[0]
    expected = model.text.projection(states[-1])
    result = model(text_only(cut, cut_mask)).text[0]
    torch.testing.assert_close(result, expected / expected.norm(), rtol=0, atol=1e-5)


# -- initialisation -----------------------------------------------------------------------------


def test_towers_start_the_same_with_and_without_heads_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plain = build_two_tower(small_config(), word_tokenizer(), seed=5).state_dict()
    torch.randn(7)
    torch.set_rng_state(before)
    headed = build_two_tower(small_config(head={}), word_tokenizer(), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, headed[name]) for name, value in plain.items())
    heads = {n.split(".", 1)[1]: v for n, v in headed.items() if n.startswith("text_head.")}
    assert heads
    assert all(torch.equal(v, headed[f"image_head.{n}"]) for n, v in heads.items())
    other = build_two_tower(small_config(), word_tokenizer(), seed=6).state_dict()
    name = "text.projection.weight"
    assert not torch.equal(other[name], plain[name])


# -- training -----------------------------------------------------------------------------------


def loss_of(model: TwoTower, batch: Batch) -> Tensor:
    features = model(batch)
    logits = features.logit_scale * features.image @ features.text.T
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
    if features.image_projected is not None:
        pairs = (features.image_projected * features.text_projected).sum(dim=1)
        loss = loss + (features.prototype_scale * pairs).square().mean()
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_keeps_its_weights_and_stays_in_evaluation(
    kind: str, saved: dict[str, str]
) -> None:
    text = {"width": 32, "layers": 2, "heads": 2} if kind == "clip" else {"path": saved[kind]}
    model = build(kind, saved, text={**text, "trained": False})
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss_of(model, small_batch()).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if not n.startswith("text.backbone.")}
    assert not any(module.training for module in model.text.backbone.modules())
    assert model.text.projection.training
    assert model.image.backbone.training
    assert model.count_parameters()["trained"] == sum(before[n].numel() for n in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_and_gives_the_same_gradients(
    kind: str, saved: dict[str, str]
) -> None:
    def gradients(enabled: bool) -> tuple[dict[str, Tensor], list[int]]:
        model = build(kind, saved, head={"hidden": 16, "dim": 8}).train()
        model.gradient_checkpointing(not enabled)
        model.gradient_checkpointing(enabled)
        calls = [0, 0]
        for index, tower in enumerate((model.image, model.text)):
            block = tower.backbone.get_submodule(tower.blocks)[0]
            watched = block.get_submodule(FIRST_LAYER[tower.backbone.config.model_type])

            def count(*_: object, index: int = index) -> None:
                calls[index] += 1

            watched.register_forward_hook(count)
        with torch.no_grad():
            model(small_batch())
        loss_of(model, small_batch()).backward()
        return {n: p.grad for n, p in model.named_parameters()}, calls

    kept, kept_calls = gradients(False)
    again, again_calls = gradients(True)
    assert kept_calls == [2, 2]
    assert again_calls == [3, 3]
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


def test_checkpointing_changes_nothing_in_evaluation() -> None:
    model = build_two_tower(small_config(), word_tokenizer()).eval()
    expected = model(small_batch())
    model.gradient_checkpointing(True)
    with torch.no_grad():
        result = model(small_batch())
    assert torch.equal(result.image, expected.image)
    assert torch.equal(result.text, expected.text)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_training(kind: str, saved: dict[str, str]) -> None:
    model = build(kind, saved).train()
    first, second = model(small_batch()), model(small_batch())
    assert torch.equal(first.text, second.text)
    assert torch.equal(first.image, second.image)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_runs_near_float32(kind: str, saved: dict[str, str]) -> None:
    model = build(kind, saved, head={"hidden": 16, "dim": 8})
    exact = model(small_batch())
    model.bfloat16()
    rounded = model(small_batch())
    for before, after in zip(exact, rounded, strict=True):
        if before is not None and before.dim() == 2:
            assert after.dtype == torch.float32
            assert (before * after).sum(dim=1).min().item() > 0.99
    assert torch.equal(exact.logit_scale, rounded.logit_scale)
    loss_of(model, small_batch()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(value is not None and bool(value.isfinite().all()) for value in gradients)


def test_rotary_frequencies_are_not_rounded_by_a_cast(saved: dict[str, str]) -> None:
    model = build("llama", saved)
    before = model.text.backbone.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert torch.equal(model.text.backbone.rotary_emb.inv_freq, before)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "clip",
            {
                "text.backbone.embeddings.token_embedding.weight": ("text", 2),
                "text.backbone.encoder.layers.0.mlp.fc1.bias": ("text", 1),
                "text.backbone.encoder.layers.1.layer_norm1.weight": ("text", 0),
                "text.backbone.final_layer_norm.weight": ("text", 0),
                "text.projection.weight": ("text", 0),
                "image.backbone.embeddings.class_embedding": ("image", 2),
                "image.backbone.pre_layrnorm.weight": ("image", 2),
                "image.backbone.post_layernorm.bias": ("image", 0),
                "logit_scale.shift": ("other", 0),
                "text_head.layers.0.weight": ("other", 0),
            },
        ),
        (
            "llama",
            {
                "text.backbone.embed_tokens.weight": ("text", 3),
                "text.backbone.layers.0.mlp.up_proj.weight": ("text", 2),
                "text.backbone.norm.weight": ("text", 0),
            },
        ),
        (
            "bert",
            {
                "text.backbone.embeddings.LayerNorm.weight": ("text", 3),
                "text.backbone.encoder.layer.1.output.dense.weight": ("text", 1),
            },
        ),
    ],
)
def test_depth_counts_the_blocks_above(
    kind: str, names: dict[str, tuple[str, int]], saved: dict[str, str]
) -> None:
    model = build(kind, saved, head={"hidden": 16, "dim": 8})
    assert set(names) <= {name for name, _ in model.named_parameters()}
    assert {name: model.parameter_depth(name) for name in names} == names


# -- refusals -----------------------------------------------------------------------------------


def test_models_that_can_not_be_a_tower_are_refused_in_one_sentence(
    saved: dict[str, str], tmp_path: Path
) -> None:
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in HALVES}
    BartModel(BartConfig(vocab_size=64, d_model=16, **sizes)).save_pretrained(tmp_path / "bart")
    cases = [
        ({"text": {"path": str(tmp_path / "nothing")}}, "there is no such folder"),
        ({"text": {"path": str(tmp_path / "bart")}}, "encoder-decoder"),
        ({"text": {"path": saved["bert"]}, "text_length": 99}, "set model.text_length=32"),
        ({"image": {"path": saved["bert"], "pooling": "last"}}, "use mean or cls"),
    ]
    for changes, says in cases:
        with pytest.raises(ConfigError, match=says):
            build_two_tower(small_config(**changes), word_tokenizer())
    more_words = word_tokenizer()
    more_words.add_tokens([f"more{index}" for index in range(9)])
    with pytest.raises(ConfigError, match=r"73 tokens, but .* for 64"):
        build_two_tower(small_config(text={"path": saved["llama"]}), more_words)


def test_the_tokenizer_of_a_loaded_text_model_is_its_own(saved: dict[str, str]) -> None:
    loaded = small_config(text={"path": saved["bert"]})
    assert (loaded.tokenizer, loaded.vocabulary) == (None, None)
    assert small_config().vocabulary == 4096
    with pytest.raises(ValidationError, match="vocabulary is that of the tokenizer in"):
        small_config(text={"path": saved["bert"]}, vocabulary=300)
