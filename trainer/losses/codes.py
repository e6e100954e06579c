"""Vector quantisation: the nearest of K codes for every state, and what pulls the two together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm

_BLOCK = 1 << 24
"""Distances that exist at one time: 64 MiB."""


class Quantised(NamedTuple):
    """States that were replaced by codes."""

    states: Float[Tensor, "batch patches dim"]
    """The codes in the forward pass; gradients go to the states that they stand for."""
    codes: Int64[Tensor, "batch patches"]
    commitment: Float[Tensor, " batch"]
    """mean |z - sg(e)|^2 of a sample: moves the states to their codes."""
    codebook: Float[Tensor, " batch"]
    """mean |sg(z) - e|^2: the same number, and moves the codes to their states."""


def quantise(
    states: Float[Tensor, "batch patches dim"], codes: Float[Tensor, "codes dim"]
) -> Quantised:
    """z + sg(e_k - z) with k = argmin |z - e_k|^2, of equally near ones the first.

    Means are over patches and dimensions (VQ-VAE, arXiv 1711.00937).
    """
    nearest = nearest_codes(states.detach().flatten(0, 1), codes.detach()).view(states.shape[:2])
    chosen = codes[nearest]
    commitment = (states - chosen.detach()).square().flatten(1).mean(dim=1)
    codebook = (states.detach() - chosen).square().flatten(1).mean(dim=1)
    through = states + (chosen - states).detach()
    return Quantised(through, nearest, commitment, codebook)


class Choice(NamedTuple):
    """How patches would choose among codes if they chose softly."""

    use: Float[Tensor, "batch codes"]
    """Mean over an image's patches of p = softmax(-|z - e|^2 / temperature)."""
    doubt: Float[Tensor, " batch"]
    """Mean entropy of p over an image's patches, in nats."""


def soft_choice(
    states: Float[Tensor, "batch patches dim"],
    codes: Float[Tensor, "codes dim"],
    *,
    temperature: float,
) -> Choice:
    """Differentiable in both. A number exists for every patch and code."""
    logits = 2 * states @ codes.T - codes.square().sum(dim=1)  # |z|^2 is the same for all codes
    log_p = (logits / temperature).log_softmax(dim=2)
    p = log_p.exp()
    return Choice(p.mean(dim=1), -(p * log_p).sum(dim=2).mean(dim=1))


def untold(choice: Choice, comm: Comm) -> Float[Tensor, ""]:
    """ln K minus what a code says of its patch, in nats: the mutual information H(mean p) -
    mean H(p) over all ranks' batch. 0 where all codes are used equally and without doubt, ln K
    where patches choose alike. Equal on all ranks.
    """
    use = comm.sum(choice.use.sum(dim=0)) / (len(choice.use) * comm.world_size)
    doubt = comm.sum(choice.doubt.sum()) / (len(choice.doubt) * comm.world_size)
    spread: Tensor = torch.special.entr(use).sum()
    return math.log(use.shape[0]) - spread + doubt


def nearest_codes(
    states: Float[Tensor, "states dim"], codes: Float[Tensor, "codes dim"]
) -> Int64[Tensor, " states"]:
    """argmin_k |z|^2 + |e_k|^2 - 2 z . e_k, in blocks of states."""
    size, norms = max(1, _BLOCK // len(codes)), codes.square().sum(dim=1)
    found = [(norms - 2 * block @ codes.T).argmin(dim=1) for block in states.split(size)]
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.int64)


def share_used(
    codes: Int64[Tensor, "batch patches"], num_codes: int, comm: Comm
) -> Float[Tensor, ""]:
    """Of the codebook, in all ranks' batch; equal on all ranks."""
    seen = torch.zeros(num_codes, device=codes.device)
    seen.index_fill_(0, codes.flatten(), 1.0)
    return (comm.sum(seen) > 0).float().mean()
