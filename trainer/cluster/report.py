"""What is logged of an episode: balance of its clusters, agreement of spaces and classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from trainer.cluster.kmeans import KMeansResult
from trainer.cluster.quality import balance, normalized_mutual_information
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels

Space = Literal["image", "text"]


def agreement(
    clustered: Mapping[Space, KMeansResult],
    ids: Int64[Tensor, " n"],
    classes: ClusterLabels | None,
    comm: Comm,
) -> dict[str, float]:
    """Figures of the image and the text clustering of the same samples (this rank's `ids`).

    The objective is the mean squared distance; NMI is between the two clusterings, and of each
    with the classes where these are known.
    """
    figures = {
        "nmi_image_text": normalized_mutual_information(
            clustered["image"].labels, clustered["text"].labels, comm
        )
    }
    for space, result in clustered.items():
        named: dict[str, float] = {}
        if classes is not None:
            known = classes.of(ids)
            named["nmi_classes"] = normalized_mutual_information(result.labels, known, comm)
        named["objective"] = result.inertia / max(1, int(result.counts.sum()))
        named |= balance(result.counts)
        named["repaired"] = float(result.repaired)
        figures |= {f"{space}_{name}": value for name, value in named.items()}
    return figures


def unknown_rate(labels: ClusterLabels, ids: Int64[Tensor, " n"], comm: Comm) -> float:
    """Share of all ranks' samples that have no label."""
    known = (labels.of(ids) >= 0).sum()
    counts = comm.sum(torch.stack([known, known.new_tensor(len(ids))]).to(comm.device))
    found, asked = counts.tolist()
    return float(1.0 - found / max(1, asked))
