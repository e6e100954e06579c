"""Facets in one pass: the published mask, and equality with one pass per facet."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, LlamaConfig, LlamaModel

from trainer.teachers.facets import (
    PAD,
    Packed,
    facet_inputs,
    facet_mask,
    facet_positions,
    facet_states,
    pack,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "flame"
SMOLLM2 = Path(__file__).parents[2] / "cache" / "teachers" / "smollm2-135m"
FACETS = [[1, 11, 12, 2], [13, 2], [14, 15, 16, 17, 2]]
PREFIXES = [[5, 6, 7, 8, 9], [10, 11], [20, 21, 22, 23, 24, 25, 26, 27]]


@cache
def llama() -> LlamaModel:
    settings = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaModel._from_config(settings, attn_implementation="sdpa").eval()


@torch.no_grad()
def vectors(batch: Packed, model: torch.nn.Module | None = None) -> Tensor:
    return normalize(facet_states(model or llama(), batch), dim=-1)


@torch.no_grad()
def alone(prefix: list[int], facet: list[int], model: torch.nn.Module | None = None) -> Tensor:
    """The plainest way: one caption, one facet, the model's own causal mask and positions."""
    states = (model or llama())(input_ids=torch.tensor([[*prefix, *facet]])).last_hidden_state
    return normalize(states[0, -1], dim=-1)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("facet_mask_*.npz")), ids=lambda p: p.stem)
def test_masks_and_positions_of_the_published_code(path: Path) -> None:
    """Rows of padding are nobody's: there they are empty, here padding sees itself."""
    with np.load(path, allow_pickle=False) as file:
        case = {name: torch.from_numpy(file[name]) for name in file.files}
    real = case["attention_mask_2d"].bool()
    segment = torch.where(real, case["facet_id"].expand_as(real).long(), PAD)
    for name, reference in (("allowed_corrected", False), ("allowed_reference", True)):
        ours = facet_mask(segment, reference_pad=reference)
        assert torch.equal(ours[real], case[name].bool()[real]), name
        assert torch.equal(ours[~real], torch.eye(segment.shape[1]).bool().expand_as(ours)[~real])
    suggested = case["position_ids_reset_suggestion"].long()
    assert torch.equal(facet_positions(segment)[real], suggested[real])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("facet_mask_*.npz")), ids=lambda p: p.stem)
def test_packing_reads_where_the_published_code_reads(path: Path) -> None:
    """In its own layout: the same columns, segments and additive mask from the lengths alone."""
    with np.load(path, allow_pickle=False) as file:
        case = {name: torch.from_numpy(file[name]) for name in file.files}
    prefixes = [[3] * count for count in case["prefix_lengths"].tolist()]
    facets = [[4] * count for count in case["facet_lengths"].tolist()]
    packed = pack(prefixes, facets, pad=0, reference_pad=True)
    assert torch.equal(packed.readout, case["readout_index"].expand(len(prefixes), -1))
    real = case["attention_mask_2d"].bool()
    assert torch.equal(packed.segment != PAD, real)
    assert torch.equal(packed.segment[real], case["facet_id"].expand_as(real)[real])
    starts, ends = case["facet_start"], case["facet_end_exclusive"]
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True), 1):
        assert (packed.segment[:, start:end] == number).all()
    added = facet_inputs(packed, torch.float64)["attention_mask"][:, 0]
    assert torch.equal((added == 0)[real], case["allowed_reference"].bool()[real])
    assert (added[added != 0] <= case["additive_fill"]).all()
    # Filled up on the right, as we do: the same tokens of each caption are read.
    ours = pack(prefixes, facets, pad=0)
    shift = (~real).sum(dim=1, keepdim=True)
    assert torch.equal(ours.readout + shift, packed.readout)


@settings(max_examples=30, deadline=None)
@given(
    prefix=st.integers(1, 6), facets=st.lists(st.integers(1, 4), max_size=4), pad=st.integers(0, 3)
)
def test_the_mask_is_the_drawing(prefix: int, facets: list[int], pad: int) -> None:
    """Token by token."""
    parts = [0] * prefix + [i for i, n in enumerate(facets, 1) for _ in range(n)] + [PAD] * pad
    mask = facet_mask(torch.tensor([parts]))[0]
    for query, mine in enumerate(parts):
        for key, theirs in enumerate(parts):
            seen = key <= query and mine != PAD and (theirs in (0, mine))
            assert mask[query, key] == (seen or query == key)


def test_one_pass_equals_a_pass_per_facet() -> None:
    """Whatever the padding and the batch mates are."""
    packed = vectors(pack(PREFIXES, FACETS, pad=0))
    for row, prefix in enumerate(PREFIXES):
        for index, facet in enumerate(FACETS):
            torch.testing.assert_close(packed[row, index], alone(prefix, facet), atol=1e-6, rtol=0)


def test_order_mates_and_padding_change_nothing() -> None:
    """And facets in another order."""
    packed = vectors(pack(PREFIXES, FACETS, pad=0))
    single = torch.cat([vectors(pack([prefix], FACETS, pad=0)) for prefix in PREFIXES])
    longer = vectors(pack([*PREFIXES, list(range(40))], FACETS, pad=7))[:3]
    permuted = vectors(pack(PREFIXES[::-1], FACETS[::-1], pad=0)).flip(0, 1)
    for other in (single, longer, permuted):
        torch.testing.assert_close(other, packed, atol=1e-6, rtol=0)


def test_the_prefix_does_not_see_the_facets() -> None:
    """Bit-identical states of the prefix under other facets of the same lengths."""
    states = []
    for facets in (FACETS, [[30, 31, 32, 33], [34, 35], [36, 37, 38, 39, 40]]):
        batch = pack(PREFIXES[:1], facets, pad=0)
        states.append(facet_states(llama(), batch._replace(readout=torch.arange(5)[None])))
    assert torch.equal(*states)


def test_the_released_padding_and_positions_are_another_embedding() -> None:
    """There a caption's vector depends on its batch mates, and only a row's first facet without
    padding is what a pass of its own would give."""
    packed = vectors(pack(PREFIXES, FACETS, pad=0))
    theirs = vectors(pack(PREFIXES, FACETS, pad=0, reference_pad=True))
    unpadded = vectors(pack(PREFIXES[2:], FACETS, pad=0, reference_pad=True))
    torch.testing.assert_close(theirs[2:], unpadded, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs[2, 0], packed[2, 0], atol=1e-6, rtol=0)
    assert (theirs[2, 1:] - packed[2, 1:]).norm(dim=-1).min() > 1e-3
    assert (theirs[:2] - packed[:2]).norm(dim=-1).min() > 1e-2


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2 is not in the cache")
def test_smollm2_agrees_too() -> None:
    model = AutoModel.from_pretrained(SMOLLM2, dtype=torch.float32, local_files_only=True).eval()
    packed = vectors(pack(PREFIXES, FACETS, pad=0), model)
    for row, prefix in enumerate(PREFIXES):
        for index, facet in enumerate(FACETS):
            expected = alone(prefix, facet, model)
            torch.testing.assert_close(packed[row, index], expected, atol=1e-5, rtol=0)
