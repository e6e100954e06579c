"""How every command line ends: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from trainer.errors import TrainerError


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call `main` and leave the process; of several ranks only the first one speaks."""
    try:
        main()
    except TrainerError as error:
        if os.environ.get("RANK", "").strip() in {"", "0"}:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        leave()
    sys.exit(0)


def leave() -> None:
    """Leave the process group, if this process ever came so far as to join one."""
    if "trainer.comm" in sys.modules:
        sys.modules["trainer.comm"].leave_group()
