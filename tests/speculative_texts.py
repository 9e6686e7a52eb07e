"""What vLLM answers with drafts and without: python -m tests.speculative_texts FOLDER.

Small models in float32, so that a batch of other rows does not tip the scales. For each of `ways` a line begins with
RESULT and holds, as JSON, its name and what `answers` returns. FOLDER has what drafts: `draft`, a model with the demo
model's tokens; `eagle3`, a head for it; `mtp`, a model with a head of its own.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is asked below

from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry
from vllm.sampling_params import StructuredOutputsParams

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines import draft_length
from ipex_vllm.engines.vllm_drafts import LookupDraftingScheduler, ModelDraftingScheduler
from ipex_vllm.engines.vllm_requests import draft_counts

LOOKUP = {"method": "custom_class", "model": "ipex_vllm.low_bit.vllm.speculation.NoDrafts", "num_speculative_tokens": 4}
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["chunk", "chunks"]}}, "required": ["name"]}
QUESTION = "What does textwrap.wrap do? " * 3
# What is asked for, by the name of the promise. Each has one right answer: greedy, or so narrow that it is.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "stop": {"stop": ["called"], "include_stop_str_in_output": True},
    "stop_token": {"stop_token_ids": list(range(300, 600))},
    "min_tokens": {"min_tokens": 18, "ignore_eos": False},
    "penalties": {"presence_penalty": 0.4, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "bad_words": {"bad_words": ["."]},
    "allowed": {"allowed_token_ids": list(range(40, 400))},
    "bias": {"logit_bias": dict.fromkeys(range(100, 110), 100.0)},
    "min_p": {"temperature": 1.5, "min_p": 1.0},
    "several": {"temperature": 0.01, "n": 2},
    "json": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
}
NARROW = {"temperature": 1.5, "top_p": 0.97, "allowed_token_ids": [301, 302, 303, 304], "max_tokens": 4}
NUM_SAMPLES = 1000
NUM_BESIDE = 3


class Asking(ModelDraftingScheduler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, step_cost=0.1, **options)


@dataclass(frozen=True)
class Way:
    """vLLM's arguments, and what it is asked; `is_whole`: also for samples, and in the middle of drafts to stop."""

    arguments: dict[str, Any]
    prompt: Any = QUESTION
    cases: tuple[str, ...] = tuple(CASES)
    is_whole: bool = True


def ways(folder: Path) -> dict[str, Way]:
    """Each way of drafting, and each model without."""
    model = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    eagle3 = {"method": "eagle3", "model": str(folder / "eagle3"), "num_speculative_tokens": 3}
    mtp = {"method": "mtp", "num_speculative_tokens": 1}
    # Its tokens are no text.
    ernie = {"model": str(folder / "mtp"), "max_model_len": 256}
    numbers, greedy = {"prompt_token_ids": list(range(20, 60))}, ("plain", "logprobs", "penalties")
    return {
        "off": Way({}),
        "lookup": Way({"speculative_config": LOOKUP, "scheduler_cls": LookupDraftingScheduler}),
        "model": Way({"speculative_config": model, "scheduler_cls": Asking, "async_scheduling": False}),
        "eagle3": Way({"speculative_config": eagle3}, cases=(*greedy, "stop", "json"), is_whole=False),
        "mtp off": Way(ernie, numbers, greedy, is_whole=False),
        "mtp": Way({**ernie, "speculative_config": mtp}, numbers, greedy, is_whole=False),
    }


def answers(way: Way) -> dict[str, Any]:
    """Tokens and log-probabilities of each case, twice; how often tokens are sampled; what is left of aborted ones."""
    metrics = {"per_request_spec_decode_metrics": "summary"} if "speculative_config" in way.arguments else {}
    defaults = {"model": str(MODEL_DIR), "max_model_len": 512}
    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=0.1,
        **{**defaults, **metrics, **way.arguments},
    )
    params = {
        name: SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **CASES[name]})
        for name in way.cases
    }
    drafted = 0
    cases: dict[str, list[Any]] = {}
    for _ in range(2):  # the second time all of a prompt is cached but for its last token
        for first in range(0, len(way.cases), NUM_BESIDE):
            names = way.cases[first : first + NUM_BESIDE]
            outputs = llm.generate([way.prompt] * len(names), [params[name] for name in names], use_tqdm=False)
            for name, output in zip(names, outputs, strict=True):
                choices = [told(choice) for choice in output.outputs]
                cases.setdefault(name, []).append([rounded(output.prompt_logprobs), *choices])
                drafted += sum(draft_counts(choice)[0] for choice in output.outputs)
    result = {"cases": cases, "drafted": drafted}
    if way.is_whole:
        result |= {"sampled": sampled(llm), "left": left(llm)}
    llm.llm_engine.engine_core.shutdown()
    return result


def told(choice: Any) -> list[Any]:
    """What a client sees of a choice."""
    return [list(choice.token_ids), choice.text, choice.finish_reason, rounded(choice.logprobs)]


def rounded(logprobs: Any) -> list[dict[int, float]]:
    return [
        {token: round(entry.logprob, 3) for token, entry in place.items()}
        for place in logprobs or ()
        if place is not None
    ]


def sampled(llm: LLM) -> dict[str, int]:
    """How often each triple of tokens follows a prompt in which all of them occurred."""
    prompt = {"prompt_token_ids": [301, 302, 303, 304, 302, 301, 304, 303] * 4}
    outputs = llm.generate([prompt] * NUM_SAMPLES, SamplingParams(**NARROW, ignore_eos=True), use_tqdm=False)
    return Counter(" ".join(map(str, output.outputs[0].token_ids[1:])) for output in outputs)


def left(llm: LLM) -> int:
    """Blocks of the KV cache and memories of drafts that requests keep which were aborted in the middle."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    names = [f"abort-{number}" for number in range(4)]
    for name in names:
        engine.add_request(name, QUESTION, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    for _ in range(12):
        engine.step()
    assert pool.get_num_free_blocks() < before
    engine.abort_request(names)
    engine.step()
    return before - pool.get_num_free_blocks() + len(scheduler.requests) + len(getattr(scheduler, "_kept", ()))


def main() -> None:
    # vLLM looks at each class of models in a process of its own, for the sake of CUDA; here that only takes long.
    registry._run_in_subprocess = lambda look: look()
    draft_length.FREE_ROWS = 1e6  # all drafts pay, so that there is something to check
    for name, way in ways(Path(sys.argv[1])).items():
        # Each in a process of its own, which has vLLM imported: what one leaves behind, the next one stumbles over.
        child = os.fork()
        if child == 0:
            result = json.dumps({name: answers(way)})
            os.write(1, f"\nRESULT {result}\n".encode())
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
