"""The engine on plain Transformers: the baseline that the vLLM engine is compared with.

One thread does all the work, one request after the other; it is the queue as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import Delta, Generation, InternalError, InvalidParameter
from ipex_vllm.engines.older_transformers import readable_model
from ipex_vllm.engines.template_bound import bound_templates
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.errors import EngineError, OneLine, OptionError, root_cause
from ipex_vllm.low_bit.completeness import check_loaded, loading_report
from ipex_vllm.low_bit.hf import quantize_model
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import DEFAULT_CONTEXT_LENGTH, Demands, Plan, weight_format
from workers.hf_generation import GenerationRun
from workers.hf_ipex import check_for_ipex, load_with_ipex

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_CONTEXT_LENGTH = 1 << 30  # a tokenizer that knows no limit says a larger number
EMBEDDING_BATCH_TOKENS = 2048  # with padding


class HfEngine(Engine):
    name = "Transformers"

    def __init__(
        self, model: Any, tokenizer: Any, context_length: int, thread: ThreadPoolExecutor, has_ipex: bool
    ) -> None:
        self._model = model
        self._has_ipex = has_ipex
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._thread = thread
        self._encoder = PromptEncoder(tokenizer, context_length)
        self._eos_token_ids = eos_token_ids(tokenizer, model.generation_config)
        # A checkpoint's own sampling defaults would slip into requests that ask for none.
        model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id or 0)
        self._active: set[threading.Event] = set()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(compile=False)
        group = parser.add_argument_group("Transformers")
        group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="context length; default: the model's")
        group.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings")
        group.add_argument("--ipex", action="store_true", help="optimize the model with Intel's extension for PyTorch")

    @classmethod
    def check(cls, options: WorkerOptions, args: argparse.Namespace) -> None:
        if options.compile:
            raise OptionError("--compile: Transformers runs the model eagerly here; leave it out")
        if options.upstream_kernels:
            raise OptionError("--upstream-kernels: vLLM's engine has them, this worker has Transformers' own")
        if options.low_bit_cache is not None:
            raise OptionError("--low-bit-cache: what vLLM's engine keeps; this worker quantizes at each start")
        if args.ipex:
            check_for_ipex(options)
            return
        format = weight_format(options)
        if format is not None and options.device != "cpu" and format.kind != "dtype":
            raise OptionError(
                f"--low-bit {options.low_bit}: on --device {options.device} this worker has bf16, fp16 and fp32"
            )

    @classmethod
    def demands(cls, args: argparse.Namespace) -> Demands:
        return Demands(max_model_len=args.max_model_len)

    @classmethod
    async def start(cls, plan: Plan) -> HfEngine:
        thread = ThreadPoolExecutor(1, "generation", initializer=use_cores, initargs=(plan.rank_cores[0],))
        return await asyncio.get_running_loop().run_in_executor(thread, cls._load, plan, thread)

    @classmethod
    def _load(cls, plan: Plan, thread: ThreadPoolExecutor) -> HfEngine:
        bound_templates()
        args = plan.engine_args
        try:
            with tempfile.TemporaryDirectory(prefix="ipex-vllm-") as folder:
                # The extension's environment has Transformers 4.
                path = readable_model(plan.model_path, Path(folder)) if args.ipex else plan.model_path
                config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
                context_length = choose_context_length(config, tokenizer, args.max_model_len)
                model = load_model(path, plan)
        except OneLine:
            raise
        except Exception as error:  # of any kind: a checkpoint can bring its own code
            logger.debug("Transformers could not load the model", exc_info=True)
            raise EngineError(f"Transformers could not load {plan.model_path}: {root_cause(error)}") from error
        return cls(model, tokenizer, context_length, thread, args.ipex)

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    async def count_tokens(self, prompt: str) -> int:
        return len(await self._encoder.encode(prompt))

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[list[Delta] | None] = asyncio.Queue()
        prompt = with_some(await self._encoder.encode_for_generation(generation))
        with self._abortable() as aborted:
            run = GenerationRun(
                self._model,
                self._decode,
                functools.partial(self._decode, skip_special_tokens=False),
                generation,
                prompt,
                max_new_tokens=min(generation.max_new_tokens, self._context_length - len(prompt)),
                stop_token_ids=self._stop_token_ids(generation),
                on_step=lambda deltas: loop.call_soon_threadsafe(steps.put_nowait, deltas),
                aborted=aborted,
                has_own_cache=self._has_ipex,
            )
            generated = loop.run_in_executor(self._thread, run.run)
            generated.add_done_callback(lambda _: steps.put_nowait(None))
            while (deltas := await steps.get()) is not None:
                for delta in deltas:
                    yield delta
            await self._finished(generated)

    async def embed(self, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
        """The mean of the last hidden states over each input's tokens, divided by its norm."""
        token_ids = [with_some(await self._encoder.encode_fitting(text)) for text in inputs]
        with self._abortable() as aborted:
            embedded = asyncio.get_running_loop().run_in_executor(self._thread, embed, self._model, token_ids, aborted)
            return await self._finished(embedded), sum(map(len, token_ids))

    async def wait_dead(self) -> str:
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def stop(self) -> None:
        for aborted in self._active:
            aborted.set()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _stop_token_ids(self, generation: Generation) -> frozenset[int]:
        return frozenset(generation.stop_token_ids) | (frozenset() if generation.ignore_eos else self._eos_token_ids)

    @contextlib.contextmanager
    def _abortable(self) -> Iterator[threading.Event]:
        """An event that is set when the caller has gone, or when the engine stops."""
        aborted = threading.Event()
        self._active.add(aborted)
        try:
            yield aborted
        finally:
            aborted.set()
            self._active.remove(aborted)

    async def _finished(self, work: asyncio.Future[Result]) -> Result:
        """Wait for work on the thread. Raises InternalError."""
        try:
            return await work
        except Exception as error:
            logger.error("Generation failed", exc_info=error)
            raise InternalError(f"The engine failed: {root_cause(error)} Send the request again later.") from error


def use_cores(cores: Sequence[int]) -> None:
    """Compute on `cores` only, one OpenMP thread each: both are properties of the thread that calls this."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def load_model(path: str, plan: Plan) -> Any:
    """Load the model in the chosen format, ready to generate on the chosen device. Raises EngineError."""
    trust_remote_code = plan.engine_args.trust_remote_code
    if plan.engine_args.ipex:
        return load_with_ipex(path, plan.low_bit, trust_remote_code)
    format = weight_format(plan)
    dtype: str | None = "auto"
    if format is not None:
        # Low-bit kernels take their activations in bfloat16.
        dtype = format.dtype if format.kind == "dtype" else "bfloat16"
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    # Transformers fills what is missing with random numbers, and says so in a table.
    check_loaded(path, *loading_report(report))
    if format is not None and format.kind != "dtype":
        quantize_model(model, format.name, head=plan.low_bit_head, outer=plan.low_bit_outer)
    return model.to(plan.device).eval()


def choose_context_length(config: Any, tokenizer: Any, chosen: int | None) -> int:
    """What the model and its tokenizer allow, as vLLM reads it, or less. Raises OptionError."""
    limits = [
        limit
        for limit in (getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length)
        if limit is not None and limit <= MAX_CONTEXT_LENGTH
    ]
    longest = min(limits, default=DEFAULT_CONTEXT_LENGTH)
    if chosen is not None and not 1 < chosen <= longest:
        raise OptionError(f"--max-model-len {chosen}: the model has a context of {longest} tokens")
    return chosen or longest


def eos_token_ids(tokenizer: Any, generation_config: GenerationConfig) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's one, and those in generation_config.json, which can be several."""
    configured = generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in (tokenizer.eos_token_id, *several) if token_id is not None)


@torch.inference_mode()
def with_some(token_ids: list[int]) -> list[int]:
    """Raise InvalidParameter where there are none."""
    if not token_ids:
        raise InvalidParameter("The text has no tokens. Send some.")
    return token_ids


def embed(model: Any, token_ids: Sequence[list[int]], aborted: threading.Event) -> list[list[float]]:
    """Mean-pooled, normalised last hidden states, in the order of `token_ids`; fewer of them once `aborted` is set."""
    vectors: dict[int, list[float]] = {}
    for batch in embedding_batches([len(ids) for ids in token_ids]):
        if aborted.is_set():
            break
        rows = [torch.tensor(token_ids[index]) for index in batch]
        input_ids = pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device).unsqueeze(1)
        # Padded on the right, where a causal model's other tokens do not see it.
        mask = (torch.arange(input_ids.shape[1], device=model.device) < lengths).long()
        hidden = model.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        means = (hidden * mask.unsqueeze(2)).sum(dim=1) / lengths
        vectors.update(zip(batch, normalize(means).tolist(), strict=True))
    return [vectors[index] for index in sorted(vectors)]


def embedding_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group the indices of inputs of about the same length, with at most EMBEDDING_BATCH_TOKENS in a group."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > EMBEDDING_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch
