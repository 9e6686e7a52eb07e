"""What serving and planning need of an engine. Imports no model library: each engine lives in its own world."""

from __future__ import annotations

import abc
import argparse
import contextlib
import os
import warnings
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from starlette.types import ASGIApp

from ipex_vllm.engines.generation import Delta, Generation, InvalidParameter
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import Demands, Plan, weight_format


class Engine(abc.ABC):
    """A loaded model. Only engine modules see a model library; only `RequestError`s leave them once started."""

    name: ClassVar[str]
    reads_gguf: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the engine's own options to the worker's parser."""

    @classmethod
    def quiet(cls) -> None:
        """Let the model library, not imported yet, log errors alone, in all of its processes."""
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        if os.environ["PYTHONWARNINGS"] == "ignore":  # and in this one, which has read it already
            warnings.simplefilter("ignore")

    @classmethod
    def add_listed_arguments(cls, parser: argparse.ArgumentParser) -> bool:
        """Add them without the model library, from a listing of their names and kinds; False if there is none."""
        return False

    @classmethod
    def check(cls, options: WorkerOptions, args: argparse.Namespace) -> None:
        """Raise OptionError for options that this engine cannot serve; `args` are its own."""
        weight_format(options, options.device)

    @classmethod
    def demands(cls, args: argparse.Namespace) -> Demands:
        """What the engine's own options ask of the plan."""
        return Demands()

    @classmethod
    @abc.abstractmethod
    async def start(cls, plan: Plan) -> Engine:
        """Load the model. Raises EngineError, and OptionError for what only the whole plan shows to be wrong."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """The most tokens that prompt and completion may have together."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names under which the model answers with an adapter (LoRA); they may come and go."""
        return ()

    @property
    def reads_images(self) -> bool:
        """Whether a prompt may have pictures."""
        return False

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model."""

    @abc.abstractmethod
    def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        """Generate; closing the generator aborts the request and frees what it holds. Raises RequestError."""

    @abc.abstractmethod
    async def count_tokens(self, prompt: str) -> int:
        """How many tokens `prompt` has, as `stream` would count them."""

    async def warm_up(self) -> None:
        """Compute once: some of an engine's code is compiled at the first request. Raises RequestError."""
        generation = Generation("Hello", max_new_tokens=4, seed=0, ignore_eos=True)
        async with contextlib.aclosing(self.stream(generation, "warm-up")) as deltas:
            async for _ in deltas:
                pass

    async def embed(self, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
        """Return one vector per input, each of norm 1, and the number of tokens in all. Raises RequestError."""
        raise InvalidParameter(
            f"The {self.name} engine does not give embeddings. Serve them with `python -m workers.hf_worker`."
        )

    async def openai_application(self) -> ASGIApp | None:
        """An application of the engine's own for OpenAI's API, which takes its turns (turns.py); None without one.

        Raises EngineError.
        """
        return None

    @abc.abstractmethod
    async def wait_dead(self) -> str:
        """Return a line that says why, once the engine can serve no more; never while it is well."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """End the engine and all its processes."""
