"""How much one request may ask for, whatever its protocol: what is beyond would hold up everybody's.

Standard library only. An application that an engine brings along calls the same checks with its own parameters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence

from ipex_vllm.engines.generation import InvalidParameter

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 128  # every token's text is searched for each
MAX_STOP_CHARACTERS = 16 << 10  # of all of them
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROB_ENTRIES = 1 << 18  # of an answer; they are written in one go, 7 MB and a fifth of a second for so many
MAX_INT32 = 2**31 - 1  # token ids and top_k are 32-bit integers in engines
MAX_SHOWN = 100  # characters of a refused value that an error repeats

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = MAX_SHOWN


def shown(value: object) -> str:
    """What an error shows of a value that it refuses."""
    return _SHORT.repr(value)[:MAX_SHOWN]


def check_stops(stops: Sequence[str], stop_token_ids: Collection[int]) -> None:
    """Raise InvalidParameter for more stop strings or token ids than can be looked for."""
    if len(stops) > MAX_STOPS:
        raise InvalidParameter(f"stop has {len(stops)} strings; at most {MAX_STOPS} are possible.")
    if (num_characters := sum(map(len, stops))) > MAX_STOP_CHARACTERS:
        raise InvalidParameter(
            f"The stop strings have {num_characters} characters; at most {MAX_STOP_CHARACTERS} are possible."
        )
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidParameter(
            f"stop_token_ids has {len(stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are possible."
        )


def check_logprobs(num_choices: int, logprobs: int | None, num_tokens: int) -> None:
    """Raise InvalidParameter for more log probabilities than an answer holds.

    Args:
        num_choices: the request's `n`.
        logprobs: alternatives for each token; None where there is no report.
        num_tokens: the most that are reported of a choice, those of the prompt with them.
    """
    if logprobs is None:
        return
    num_entries = num_choices * (logprobs + 1) * num_tokens
    if num_entries > MAX_LOGPROB_ENTRIES:
        raise InvalidParameter(
            f"n={num_choices} with logprobs={logprobs} for up to {num_tokens} tokens are {num_entries} log "
            f"probabilities, n x (logprobs + 1) x tokens; at most {MAX_LOGPROB_ENTRIES} are possible. Ask for less, "
            "or lower max_new_tokens."
        )


def check_text(name: str, text: str) -> None:
    """Raise InvalidParameter for what JSON can spell and UTF-8 cannot, and so no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameter(
            f"{name} holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character {error.start}, which "
            "is no text."
        ) from None
