"""How an application that an engine brings along, with a protocol of its own, takes its turn among all requests.

Whoever calls the application holds a turn for it; before the application asks the engine for anything it begins, and
while it answers it counts. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from ipex_vllm.engines.generation import RequestError


class Turn(Protocol):
    """One client's request, which may ask the engine for several texts."""

    async def begin(self, prompt: Callable[[], str], size: int) -> None:
        """Wait for a slot, which the whole request then has, as one of about `size` tokens waits, prompt and texts.

        `prompt` gives the text, for a log that shows it.
        """

    def count(
        self, prompt_tokens: int, completion_tokens: int, finish_reason: str | None, first_token_at: float | None
    ) -> None:
        """Add what is new. `finish_reason` is a text's last word; `first_token_at` is in seconds of time.monotonic."""

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Add a text's draft tokens, and those of them that were accepted."""

    def fail(self, error: RequestError) -> None:
        """Remember what ended the request, for the log and the metrics, where the client is told by the application."""


current_turn: ContextVar[Turn] = ContextVar("current_turn")
