"""Small tars with known contents, as other programs write them."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

Samples = dict[str, dict[str, bytes]]


def make_samples(count: int, *, seed: int = 0, prefix: str = "k") -> Samples:
    """Keys with a txt, a bin of 0 to 2000 random bytes, and sometimes an empty json."""
    draw = random.Random(seed)
    samples: Samples = {}
    for number in range(count):
        fields = {"txt": f"caption {number}".encode(), "bin": draw.randbytes(draw.randrange(2000))}
        if number % 3 == 0:
            fields["json"] = b""
        samples[f"{prefix}{number:04d}"] = fields
    return samples


def write_tar(path: Path, samples: Samples, *, format: int = tarfile.USTAR_FORMAT) -> str:
    members = [
        (f"{key}.{suffix}", data)
        for key, fields in samples.items()
        for suffix, data in fields.items()
    ]
    return write_members(path, members, format=format)


def write_members(
    path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT
) -> str:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)
