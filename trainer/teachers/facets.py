"""Several questions about one caption in one forward pass of a causal language model.

A row is the caption with its prompt (the prefix), then facets: short continuations that must not
see each other. FLAME, arXiv 2411.11927, section on facet-decoupled attention:

    keys:      prefix  f1  f2  f3
    prefix     causal
    f1         all     causal
    f2         all     .   causal
    f3         all     .   .   causal     what is read: the state of each facet's last token

Unlike in the original, padding is hidden from every real token, and positions of every facet
start where the prefix ends. A packed pass then gives each facet exactly what a pass with this
facet alone gives, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

PAD = -1


class Packed(NamedTuple):
    """Captions with their facets, one caption a row."""

    tokens: Int64[Tensor, "batch length"]
    positions: Int64[Tensor, "batch length"]
    segment: Int64[Tensor, "batch length"]
    """-1 for padding, 0 for the prefix, i for the i-th facet."""
    readout: Int64[Tensor, "batch facets"]
    """Column of each facet's last token."""
    reference_pad: bool = False

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in self._fields[:4]}
        return self._replace(**moved)


def pack(
    prefixes: Sequence[Sequence[int]],
    facets: Sequence[Sequence[int]],
    *,
    pad: int,
    reference_pad: bool = False,
) -> Packed:
    """Token ids of each caption (with its prompt) followed by those of all facets, padded.

    The facets are the same for all captions; none may be empty. Rows are filled up with `pad` on
    the right. `reference_pad` is the released code of FLAME, for parity alone: filled up on the
    left, padding visible as keys, and positions that count on through padding and facets.
    """
    length = max(map(len, prefixes)) + sum(map(len, facets))
    tokens = torch.full((len(prefixes), length), pad)
    segment = torch.full((len(prefixes), length), PAD)
    for row, prefix in enumerate(prefixes):
        ids = [*prefix, *(token for facet in facets for token in facet)]
        parts = [0] * len(prefix) + [i for i, facet in enumerate(facets, 1) for _ in facet]
        columns = slice(length - len(ids), length) if reference_pad else slice(len(ids))
        tokens[row, columns] = torch.tensor(ids)
        segment[row, columns] = torch.tensor(parts)
    positions = facet_positions(segment)
    if reference_pad:
        positions = torch.arange(length).expand_as(tokens)
    return Packed(tokens, positions, segment, _readout(segment, len(facets)), reference_pad)


def facet_mask(
    segment: Int64[Tensor, "batch length"], *, reference_pad: bool = False
) -> Bool[Tensor, "batch length length"]:
    """[row, query, key]: True where a token may look.

    `segment` says of each token whether it is padding (-1), prefix (0) or of facet i (from 1). A
    key is seen by later tokens of its facet, and by all later ones if it is of the prefix. Padding
    sees itself alone, so that no softmax is empty. In `reference_pad` padding is as visible as
    the prefix.
    """
    query, key = segment[:, :, None], segment[:, None, :]
    shared = key <= 0 if reference_pad else key == 0
    causal = torch.ones(segment.shape[1], segment.shape[1], device=segment.device).tril().bool()
    allowed = causal & (query != PAD) & (shared | (key == query))
    return allowed | torch.eye(segment.shape[1], device=segment.device).bool()


def facet_positions(segment: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
    """The prefix counts from 0 at its first token; every facet starts at the prefix's length."""
    own = (segment[:, :, None] == segment[:, None, :]).tril(diagonal=-1).sum(dim=2)
    prefix = (segment == 0).sum(dim=1, keepdim=True)
    positions = own + torch.where(segment > 0, prefix, 0)
    return torch.where(segment == PAD, 0, positions)


def facet_inputs(packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a decoder of transformers is called with, its attention being `sdpa` or `eager`."""
    allowed = facet_mask(packed.segment, reference_pad=packed.reference_pad)
    hidden = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    hidden.masked_fill_(~allowed, torch.finfo(dtype).min)
    return {
        "input_ids": packed.tokens,
        "attention_mask": hidden[:, None],
        "position_ids": packed.positions,
    }


def at_readout(
    states: Float[Tensor, "batch length dim"], packed: Packed
) -> Float[Tensor, "batch facets dim"]:
    """The states of the facets' last tokens."""
    columns = packed.readout.to(states.device)[..., None]
    return states.gather(1, columns.expand(-1, -1, states.shape[-1]))


def facet_states(model: Any, packed: Packed) -> Float[Tensor, "batch facets dim"]:
    """The state of every facet's last token, not normalised, from one forward pass.

    `model` is a decoder without its language head (`AutoModel`); what it gives as
    `last_hidden_state` is what is read.
    """
    inputs = facet_inputs(packed, next(model.parameters()).dtype)
    return at_readout(model(**inputs, use_cache=False).last_hidden_state, packed)


def _readout(segment: Tensor, num_facets: int) -> Tensor:
    columns = torch.arange(segment.shape[1])
    facets = torch.arange(1, num_facets + 1)
    return ((segment[:, None, :] == facets[:, None]) * columns).amax(dim=2)
