"""How every command line ends: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from trainer.addresses import without_secrets
from trainer.errors import LostRank, TrainerError

if TYPE_CHECKING:  # torch is imported where it is wanted
    from trainer.comm import Comm


def parser_of(text: str | None, *, is_launched: bool = False) -> argparse.ArgumentParser:
    """For the options of a command, whose help begins with its file's docstring, line by line.

    `is_launched`: on several ranks. DeepSpeed's launcher passes --local_rank then, which the
    environment says as well.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if is_launched:
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def said_once(comm: Comm) -> Callable[[str], None]:
    """Prints a line on rank 0, at once."""

    def say(line: str) -> None:
        if comm.is_main:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    return say


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call `main` and end the process; of several ranks only the first one speaks."""
    code = 0
    try:
        main()
    except TrainerError as error:
        if not error.is_said and os.environ.get("RANK", "").strip() in {"", "0"}:
            sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except BaseException as error:
        _leave_group()
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            sys.excepthook = _told_without_secrets
        raise
    if code == LostRank.exit_code or _leave_group():  # whoever is gone can't leave together
        _end_at_once(code)
    sys.exit(code)


def _told_without_secrets(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A traceback, for a bug of ours; what it quotes may hold URLs."""
    lines = traceback.format_exception(kind, error, trace)
    sys.stderr.write(without_secrets("".join(lines)))


def _leave_group() -> bool:
    """Leave the process group; whether this process ever came so far as to join one."""
    return "trainer.comm" in sys.modules and bool(sys.modules["trainer.comm"].leave_group())


def _end_at_once(code: int) -> NoReturn:
    """What Python does at an exit, except that the interpreter is not taken apart.

    The group's threads outlive the group while anybody holds it. One that lets go of a tensor when
    there is no interpreter any more aborts the process, after all work was done and saved.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
