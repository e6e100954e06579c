"""Views: the same for a sample in any company, and distributed as the configuration says."""

import math
from collections.abc import Callable
from itertools import permutations

import kornia
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from trainer.config import AugmentConfig
from trainer.data.crops import Crops
from trainer.data.views import (
    IMAGE_MEAN,
    IMAGE_STD,
    View,
    augment,
    draw_view,
    normalize,
    random_crop,
)
from trainer.hashing import key_of, uniform

NOTHING = AugmentConfig(flip=0, jitter_probability=0, gray_probability=0, blur_probability=0)
ALWAYS = AugmentConfig(flip=0.5, jitter_probability=1, gray_probability=0.3, blur_probability=1)
VIEW = View(seed=3, epoch=0, purpose="train", config=AugmentConfig())


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def ids(count: int) -> torch.Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(9))


def only(**changes: object) -> AugmentConfig:
    return AugmentConfig(**{**NOTHING.model_dump(), **changes})


def pixels(normalized: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (IMAGE_STD, IMAGE_MEAN))
    return normalized * std + mean


def view(batch: torch.Tensor, names: torch.Tensor, config: AugmentConfig, **options: object):
    epochs = options.pop("epochs", torch.zeros(len(names), dtype=torch.int64))
    keys = {key: options.pop(key, value) for key, value in {"seed": 3, "purpose": "train"}.items()}
    return augment(batch, draw_view(names, epochs, **keys), config=config, **options)


def test_a_configuration_that_changes_nothing_equals_normalisation():
    batch = images(6, 20)
    before = batch.clone()
    assert torch.equal(view(batch, ids(6), NOTHING), normalize(batch))
    assert torch.equal(batch, before)
    still = only(jitter_probability=1.0, jitter=(0.0, 0.0, 0.0, 0.0))
    assert torch.equal(view(batch, ids(6), still), normalize(batch))
    expected = (batch.double() / 255 - torch.tensor(IMAGE_MEAN)[:, None, None].double()) / (
        torch.tensor(IMAGE_STD)[:, None, None].double()
    )
    assert (normalize(batch) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("size", [5, 37, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sample_gets_the_same_bits_alone_in_a_batch_and_in_any_order(size, threads):
    batch, names = images(12, size), ids(12)
    epochs = torch.arange(12) % 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = view(batch, names, ALWAYS, epochs=epochs)
        alone = [
            view(batch[i : i + 1], names[i : i + 1], ALWAYS, epochs=epochs[i : i + 1])
            for i in range(12)
        ]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        mixed = view(batch[order], names[order], ALWAYS, epochs=epochs[order])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[order], mixed)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    first = view(images(8, 16), ids(8), ALWAYS)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, view(images(8, 16), ids(8), ALWAYS))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_seed_purpose_epoch_and_sample_each_change_the_view():
    batch = images(1, 16).expand(32, -1, -1, -1).contiguous()
    names = ids(32)
    base = view(batch, names, ALWAYS)
    others = [
        view(batch, names, ALWAYS, seed=4),
        view(batch, names, ALWAYS, purpose="extract"),
        view(batch, names, ALWAYS, epochs=torch.ones(32, dtype=torch.int64)),
        view(batch, names.roll(1), ALWAYS),
    ]
    for other in others:
        assert (base != other).flatten(1).any(1).sum() >= 30
    crops = {random_crop(64, 64, sample_id=7, view=VIEW)}
    changes = ({"seed": 4}, {"epoch": 1}, {"purpose": "extract"})
    crops |= {random_crop(64, 64, sample_id=7, view=VIEW._replace(**change)) for change in changes}
    assert len(crops | {random_crop(64, 64, sample_id=8, view=VIEW)}) == 5


def happened(config: AugmentConfig, count: int = 6000) -> float:
    """The share of samples that a configuration changes."""
    batch = images(1, 4).expand(count, -1, -1, -1).contiguous()
    changed = view(batch, torch.arange(count), config) != normalize(batch)
    return float(changed.flatten(1).any(1).double().mean())


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "name", ["flip", "jitter_probability", "gray_probability", "blur_probability"]
)
def test_operations_happen_as_often_as_they_should(name, probability):
    strength = {"blur_sigma": (40.0, 80.0)} if "blur" in name and probability else {}
    config = only(**{name: probability}, **strength)
    spread = 5 * math.sqrt(probability * (1 - probability) / 6000)
    assert abs(happened(config) - probability) <= spread


def test_operations_are_drawn_independently():
    names = torch.arange(4000)
    batch = images(1, 6).expand(4000, -1, -1, -1).contiguous()
    plain = normalize(batch)
    kinds = (
        only(flip=0.5),
        only(jitter_probability=0.5),
        only(gray_probability=0.5),
        only(blur_probability=0.5, blur_sigma=(40.0, 80.0)),
    )
    flags = torch.stack([(view(batch, names, k) != plain).flatten(1).any(1) for k in kinds])
    assert (torch.corrcoef(flags.double()) - torch.eye(4)).abs().max() < 0.08


def test_a_flip_mirrors():
    batch = images(10, 9)
    assert torch.equal(view(batch, ids(10), only(flip=1.0)), normalize(batch.flip(-1)))


def test_gray_is_the_luma_of_bt601_in_all_channels():
    batch = images(4, 8)
    expected = (batch.double() / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    found = pixels(view(batch, ids(4), only(gray_probability=1.0)))
    assert (found - expected[:, None]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [16, 64, 224])
def test_blur_is_a_gaussian_convolution(size):
    """Another way: kornia's filter with one of the strengths that the range allows."""
    batch = images(2, size)
    low = only(blur_probability=1.0, blur_sigma=(1.5, 1.5))
    taps = 2 * max(1, round(21 * size / 224) // 2) + 1
    sigma = 1.5 * size / 224
    expected = kornia.filters.gaussian_blur2d(
        batch.float() / 255, taps, (sigma, sigma), border_type="reflect"
    )
    assert (pixels(view(batch, ids(2), low)) - expected).abs().max() < 2e-6


def jitter_of(strengths: tuple[float, float, float, float]) -> AugmentConfig:
    return only(jitter_probability=1.0, jitter=strengths)


def references() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    return {
        "brightness": kornia.enhance.adjust_brightness_accumulative,
        "contrast": kornia.enhance.adjust_contrast_with_mean_subtraction,
        "saturation": kornia.enhance.adjust_saturation_with_gray_subtraction,
        "hue": lambda x, turns: kornia.enhance.adjust_hue(x, turns * 2 * math.pi),
    }


def strengths(name: str, value: float) -> tuple[float, ...]:
    return tuple(value if name == other else 0.0 for other in references())


def drawn_factors(name: str, strength: float, count: int) -> torch.Tensor:
    """Each sample's factor, found by solving for it on a picture that nothing clips."""
    one = torch.randint(60, 120, (1, 3, 6, 6), generator=torch.Generator().manual_seed(1))
    batch = one.byte().expand(count, -1, -1, -1).contiguous()
    x = one / 255
    y = pixels(view(batch, torch.arange(count), jitter_of(strengths(name, strength))))
    if name == "hue":
        before, after = (kornia.color.rgb_to_hsv(image) for image in (x, y))
        pixel = before[0, 1].argmax()
        turned = (after[:, 0] - before[:, 0]).flatten(1)[:, pixel] / (2 * math.pi)
        return (turned + 0.5) % 1 - 0.5
    gray = kornia.color.rgb_to_grayscale(x)
    origin = {"brightness": 0 * x, "contrast": gray.mean() + 0 * x, "saturation": gray + 0 * x}
    away = (x - origin[name]).flatten()
    pixel = away.abs().argmax()
    return (y - origin[name]).flatten(1)[:, pixel] / away[pixel]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_colour_change_is_kornias_with_a_uniform_factor(name):
    factors = drawn_factors(name, 0.4, 400)
    share = (factors - (0 if name == "hue" else 1) + 0.4) / 0.8
    assert share.min() > -1e-3
    assert share.max() < 1 + 1e-3
    assert is_uniform(share.clamp(0, 1).numpy())
    batch = images(400, 8)
    found = pixels(view(batch, torch.arange(400), jitter_of(strengths(name, 0.4))))
    expected = references()[name](batch.float() / 255, factors)
    assert (found - expected).abs().max() < 2e-3  # the factors were measured, not copied


def test_a_strength_above_one_never_turns_colours_around():
    factors = drawn_factors("brightness", 1.2, 400)
    assert factors.min() >= 0
    assert factors.min() < 0.03


def test_the_four_changes_come_in_every_order():
    """Another way: all 24 orders of kornia's functions; one of them is what every sample got."""
    count, chosen = 600, (0.9, 0.9, 0.9, 0.4)
    factors = {
        name: drawn_factors(name, strength, count)
        for name, strength in zip(references(), chosen, strict=True)
    }
    batch = images(count, 8)
    found = pixels(view(batch, torch.arange(count), jitter_of(chosen)))
    errors = []
    for order in permutations(references()):
        x = batch.float() / 255
        for name in order:
            x = references()[name](x, factors[name])
        errors.append((x - found).abs().flatten(1).amax(1))
    best = torch.stack(errors).topk(2, dim=0, largest=False)
    assert best.values[0].max() < 5e-3
    told_apart = best.values[1] > 4 * best.values[0] + 1e-3  # where clipping makes them differ
    assert told_apart.double().mean() > 0.4
    counts = torch.bincount(best.indices[0][told_apart], minlength=24)
    assert counts.min() >= 1
    assert counts.max() < 5 * counts.double().mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.5, 0.5))
def test_the_short_form_of_the_hue_turn_equals_kornias(seed, turns):
    from trainer.data.colour import hue as _hue

    generator = torch.Generator().manual_seed(seed)
    batch = torch.rand(2, 3, 6, 6, generator=generator)
    batch[0, :, 0] = 0.5  # gray, black, white and pure colours
    batch[0, :, 1], batch[0, :, 2] = 0.0, 1.0
    batch[0, :, 3] = torch.tensor([1.0, 0.0, 0.0])[:, None]
    batch[0, :, 4] = torch.tensor([0.0, 1.0, 1.0])[:, None]
    factor = torch.full((2,), turns)
    expected = kornia.enhance.adjust_hue(batch, factor * 2 * math.pi)
    assert (_hue(batch, factor) - expected).abs().max() < 3e-6


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(-1, 2**62),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
)
def test_a_crop_lies_in_the_image_and_keeps_area_and_ratio(width, height, name, scale):
    config = AugmentConfig(crop_scale=scale)
    left, top, right, bottom = random_crop(
        width, height, sample_id=name, view=VIEW._replace(config=config)
    )
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert 3 / 4 - 1e-6 <= w / h <= 4 / 3 + 1e-6
    fallback = math.isclose(w, width) or math.isclose(h, height)
    area = w * h / (width * height)
    assert fallback or scale[0] - 1e-6 <= area <= scale[1] + 1e-6


def is_uniform(drawn: np.ndarray) -> bool:
    return is_distributed_as(drawn, "uniform")


def is_distributed_as(drawn: np.ndarray, others: np.ndarray | str) -> bool:
    """Kolmogorov-Smirnov finds nothing, at one false alarm in a thousand."""
    from scipy import stats

    return bool(stats.kstest(drawn, others).pvalue > 1e-3)


def crops(config: AugmentConfig, width: int, height: int, count: int = 3000) -> np.ndarray:
    chosen = VIEW._replace(config=config)
    return np.array(
        [random_crop(width, height, sample_id=name, view=chosen) for name in range(count)]
    )


def test_areas_and_places_are_uniform_where_every_pair_fits():
    boxes = crops(AugmentConfig(crop_ratio=(1.0, 1.0)), 72, 72)
    side = boxes[:, 2] - boxes[:, 0]
    area = (side / 72) ** 2
    across, down = boxes[:, 0] / (72 - side), boxes[:, 1] / (72 - side)
    assert is_uniform((area - 0.5) / 0.5)
    assert is_uniform(across)
    assert is_uniform(down)
    assert np.abs(np.corrcoef([area, across, down]) - np.eye(3)).max() < 0.08


@pytest.mark.heavy
def test_crops_follow_the_usual_rejection_scheme():
    """Another way: the scheme with numpy's generator; areas and ratios have equal distributions."""
    boxes = crops(AugmentConfig(), 100, 60)
    generator = np.random.default_rng(0)
    drawn = []
    while len(drawn) < 5000:
        area = generator.uniform(0.5, 1.0) * 6000
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= 100 and h <= 60:
            drawn.append((w * h, w / h))
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    settled = ~np.isclose(h, 60)  # without the fallback, one crop in a hundred here
    assert settled.mean() > 0.9
    expected = np.array(drawn)
    assert is_distributed_as((w * h)[settled], expected[:, 0])
    assert is_distributed_as((w / h)[settled], expected[:, 1])


def test_where_nothing_fits_the_largest_centred_box_is_taken():
    config = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3))
    box = random_crop(300, 100, sample_id=1, view=VIEW._replace(config=config))
    assert box == pytest.approx((300 / 2 - 200 / 3, 0, 300 / 2 + 200 / 3, 100))
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert random_crop(64, 64, sample_id=5, view=VIEW._replace(config=whole)) == (0, 0, 64, 64)


def test_crops_and_colours_use_unrelated_numbers():
    names = torch.arange(2000)
    batch = images(1, 4).expand(2000, -1, -1, -1).contiguous()
    flips = (view(batch, names, only(flip=0.5)) != normalize(batch)).flatten(1).any(1).numpy()
    boxes = crops(AugmentConfig(crop_ratio=(1.0, 1.0)), 64, 64, count=2000)
    assert abs(np.corrcoef(flips, boxes[:, 0])[0, 1]) < 0.08
    assert abs(np.corrcoef(flips, uniform(names, key_of(0)).numpy())[0, 1]) < 0.08


def test_solarizing_is_pillows_on_the_rows_that_draw_it():
    batch, names = images(40, 6), ids(40)
    found = pixels(view(batch, names, only(solarize_probability=0.5)))
    plain = pixels(view(batch, names, NOTHING))
    changed = (found - plain).abs().amax((1, 2, 3)) > 1e-4
    assert 8 < int(changed.sum()) < 32
    for row, is_changed in enumerate(changed.tolist()):
        picture = Image.fromarray(batch[row].permute(1, 2, 0).numpy())
        wanted = ImageOps.solarize(picture, 128) if is_changed else picture
        ours = (found[row] * 255).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, np.asarray(wanted))


def uncovered(geometry: str, count: int) -> tuple[float, float]:
    """Shares of images of 640 x 480 whose cover misses some of a view, and a tenth of one."""
    missed = []
    for sample_id in range(count):
        views = [VIEW, VIEW._replace(purpose="train/view 1")]
        crops = Crops(sample_id * 7919, views, geometry=geometry)
        left, top, right, bottom = crops.covering(640, 480)
        assert 0 <= left < right <= 640.0001
        assert 0 <= top < bottom <= 480.0001
        worst = 0.0
        for x, y, u, v in (crops.of(each, 640, 480) for each in views):
            inside = max(0, min(u, right) - max(x, left)) * max(0, min(v, bottom) - max(y, top))
            worst = max(worst, 1 - inside / ((u - x) * (v - y)))
        missed.append(worst)
    return tuple(sum(part > least for part in missed) / count for least in (1e-6, 0.1))


@pytest.mark.heavy
def test_a_cover_holds_every_view_and_the_published_one_mostly_does_not():
    assert uncovered("covering", 4000) == (0.0, 0.0)
    some, much = uncovered("as_published", 4000)
    # Of the published code itself 70.8 % and 20 % were counted.
    assert some == pytest.approx(0.708, abs=0.03)
    assert much == pytest.approx(0.20, abs=0.03)
