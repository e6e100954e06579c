"""Rows of a sharded table as named pieces, whose names say which rows of the whole they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from trainer.errors import CheckpointError

PIECE_BYTES = 32 << 20
_NAME = re.compile(r"(?P<field>\w+)/(?P<first>\d+)-(?P<last>\d+)")


def row_pieces(
    fields: Mapping[str, Tensor], *, first: int, piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Tensors whose rows are the global rows from `first` on, cut into `<field>/<first>-<last>`."""
    for field, values in fields.items():
        row_bytes = values[:1].nbytes
        size = max(1, piece_bytes // max(1, row_bytes))
        for at in range(0, len(values), size):
            piece = values[at : at + size]
            yield f"{field}/{first + at:010d}-{first + at + len(piece):010d}", piece


def fill_rows(fields: Mapping[str, Tensor], state: Mapping[str, Tensor], *, first: int) -> None:
    """Copy the global rows from `first` on out of pieces that may have been cut otherwise.

    Reads only pieces that hold some of them. CheckpointError where rows are missing or of another
    shape.
    """
    copied = dict.fromkeys(fields, 0)
    for name in state:
        piece = _NAME.fullmatch(name)
        if piece is None or piece["field"] not in fields:
            continue
        values = fields[piece["field"]]
        begin, end = int(piece["first"]), int(piece["last"])
        low, high = max(begin, first), min(end, first + len(values))
        if low < high:
            source = state[name]
            if source.shape[1:] != values.shape[1:] or len(source) != end - begin:
                raise CheckpointError(
                    f"{name} has the shape {tuple(source.shape)}, which rows of "
                    f"{tuple(values.shape[1:])} numbers have not; the checkpoint is of another head"
                )
            values[low - first : high - first].copy_(source[low - begin : high - begin])
            copied[piece["field"]] += high - low
    for field, count in copied.items():
        if count != len(fields[field]):
            raise CheckpointError(
                f"the checkpoint has {count} of the {len(fields[field])} rows of {field} that this "
                "rank needs; it is of another head or another optimizer"
            )
