"""Which language a caption is in, as a kept package says; asked for, never guessed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from trainer.curation.rows import NO_LANGUAGE
from trainer.errors import ConfigError

PACKAGE = "py3langid"


class Languages:
    """Numbers of languages, by the classifier of py3langid (97 languages, no network)."""

    def __init__(self, wanted: bool) -> None:
        self.names: tuple[str, ...] = ("",)
        self.source = "none"
        self._classify: Callable[[str], tuple[str, float]] | None = None
        if wanted:
            self._open()

    def of(self, caption: str) -> int:
        if self._classify is None or not caption:
            return NO_LANGUAGE
        return self._number[self._classify(caption)[0]]

    def _open(self) -> None:
        try:
            package: Any = importlib.import_module(PACKAGE)
        except ImportError:
            raise ConfigError(
                f"languages are told by {PACKAGE}, which is not installed: pip install {PACKAGE}"
            ) from None
        self.names = ("", *sorted(str(name) for name, _ in package.rank("a")))
        self.source = f"{PACKAGE} {package.__version__}"
        self._number = {name: place for place, name in enumerate(self.names)}
        self._classify = package.classify
