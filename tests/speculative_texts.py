"""What vLLM answers with drafts and without: python -m tests.speculative_texts DRAFT_MODEL.

The demo model in float32, so that a batch of other rows does not tip the scales. For each of `ways` a line begins with
RESULT and holds, as JSON, its name and what `answers` returns. DRAFT_MODEL is the directory of a model that has the
demo model's tokens.
"""

import json
import os
import sys
from collections import Counter
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is asked below

from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.vllm_drafts import DraftingScheduler
from ipex_vllm.engines.vllm_requests import draft_counts

LOOKUP = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
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
NUM_BESIDE = 3  # so few streams that drafts pay


class Asking(DraftingScheduler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, step_cost=0.1, **options)


def ways(draft_model: str) -> dict[str, dict[str, Any]]:
    """vLLM's arguments for each way of drafting."""
    model = {"method": "draft_model", "model": draft_model, "num_speculative_tokens": 3}
    return {
        "off": {},
        "lookup": {"speculative_config": LOOKUP, "scheduler_cls": Scheduler},
        "model": {
            "speculative_config": model,
            "scheduler_cls": Asking,
            "async_scheduling": False,
        },
    }


def answers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities of each case, twice; how often tokens are sampled; what is left of aborted ones."""
    metrics = {"per_request_spec_decode_metrics": "summary"} if "speculative_config" in arguments else {}
    llm = LLM(
        str(MODEL_DIR),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=0.1,
        **metrics,
        **arguments,
    )
    params = [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **case}) for case in CASES.values()
    ]
    drafted = 0
    cases: dict[str, list[Any]] = {}
    names = list(CASES)
    for _ in range(2):  # the second time all of a prompt is cached but for its last token
        for first in range(0, len(names), NUM_BESIDE):
            group = slice(first, first + NUM_BESIDE)
            outputs = llm.generate([QUESTION] * len(names[group]), params[group], use_tqdm=False)
            for name, output in zip(names[group], outputs, strict=True):
                choices = [told(choice) for choice in output.outputs]
                cases.setdefault(name, []).append([rounded(output.prompt_logprobs), *choices])
                drafted += sum(draft_counts(choice)[0] for choice in output.outputs)
    result = {"cases": cases, "drafted": drafted, "sampled": sampled(llm), "left": left(llm)}
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
    return before - pool.get_num_free_blocks() + len(scheduler.requests) + len(getattr(scheduler, "_acceptances", ()))


def main() -> None:
    # vLLM looks at each class of models in a process of its own, for the sake of CUDA; here that only takes long.
    registry._run_in_subprocess = lambda look: look()
    for name, arguments in ways(sys.argv[1]).items():
        # Each in a process of its own, which has vLLM imported: what one leaves behind, the next one stumbles over.
        child = os.fork()
        if child == 0:
            result = json.dumps({name: answers(arguments)})
            os.write(1, f"\nRESULT {result}\n".encode())
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
