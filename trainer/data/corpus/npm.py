"""Pinned packages of the npm index: fetched by its client, checked by SHA-256, read as archives.

Nothing of them is installed or run. `npm_sets.txt` has one line a package: icon set, version,
licence of the drawings, kind, SHA-256 of the archive.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from trainer.data.corpus.wheels import Pin, verify
from trainer.errors import DataError

DEFAULT_CACHE = Path("cache/npm")
_PARALLEL_DOWNLOADS = 3
_TIMEOUT_SECONDS = 600
_SCOPE = "@iconify-json/"

WORDS_PACKAGE = "@mdi/svg"
WORDS_PIN = Pin(
    "7.4.47",
    "mdi-svg-7.4.47.tgz",
    "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef",
)
"""Other names and keywords of one icon set's drawings, by name."""


class IconifySet(NamedTuple):
    """An icon set in the form of Iconify: one JSON with the drawings of a vendor."""

    vendor: str
    licence: str
    kind: str
    """`icon`: one colour. `color`. `emoji`: named as Unicode does. `flag`: by code of country."""
    pin: Pin

    @property
    def package(self) -> str:
        return _SCOPE + self.vendor


def _parse(table: str) -> tuple[IconifySet, ...]:
    rows = [line.split() for line in table.strip().splitlines()]
    return tuple(
        IconifySet(vendor, licence, kind, Pin(version, f"iconify-json-{vendor}-{version}.tgz", sha))
        for vendor, version, licence, kind, sha in rows
    )


SETS = _parse(Path(__file__).with_name("npm_sets.txt").read_text("utf-8"))


def pack_command(package: str, pin: Pin, folder: Path) -> list[str]:
    """The npm call that fetches one archive into `folder`; it runs no script of the package."""
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    return [*command, f"{package}@{pin.version}"]


def _download(package: str, pin: Pin, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        try:
            done = subprocess.run(
                pack_command(package, pin, Path(folder)),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise DataError(
                f"the large corpus is fetched by npm, which is not installed; install it, or put "
                f"{pin.file} into {cache} by hand"
            ) from None
        fetched = Path(folder) / pin.file
        if done.returncode != 0 or not fetched.exists():
            reason = " ".join(done.stderr.split()[-60:]) or f"exit code {done.returncode}"
            raise DataError(
                f"npm could not fetch {package}@{pin.version} into {cache}: {reason}; "
                "check the network, or put that file there by hand"
            )
        verify(fetched, pin)
        os.replace(fetched, cache / pin.file)


def fetch_archive(package: str, pin: Pin, cache: Path = DEFAULT_CACHE) -> Path:
    """Path of a pinned archive in `cache`, downloaded when absent, verified on every call."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / pin.file
    if path.exists():
        verify(path, pin)
    else:
        _download(package, pin, cache)
    return path


def fetch_sets(sets: Iterable[IconifySet], cache: Path = DEFAULT_CACHE) -> dict[str, Path]:
    """`fetch_archive` of each icon set, a few downloads at a time, by vendor."""
    wanted = list(sets)
    with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        paths = pool.map(lambda each: fetch_archive(each.package, each.pin, cache), wanted)
        return {each.vendor: path for each, path in zip(wanted, paths, strict=True)}
