"""How a program of ours ends when it cannot do what it was asked: one line on stderr, and an exit status.

OneLine            1
├── OptionError    2  an option is wrong; nothing was started
├── EngineError    1  the engine cannot start, or has ended
├── ServiceFailed  1  a program of the whole service does not start (supervisor.py)
└── ChatError      1  there is nobody to chat with (chat_servers.py)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ClassVar, NoReturn


class OneLine(Exception):
    """The message is the one line that the user sees."""

    exit_status: ClassVar[int] = 1


class OptionError(OneLine):
    """A wrong option."""

    exit_status = 2


class EngineError(OneLine):
    """The engine cannot start, or has ended."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with what it returns; a `OneLine` that leaves it is told, and decides the status."""
    try:
        status = main()
    except OneLine as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    sys.exit(status)


def root_cause(error: BaseException) -> str:
    """The innermost message of an exception chain, on one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
