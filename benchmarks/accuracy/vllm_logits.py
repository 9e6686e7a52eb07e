"""Scores a model through vLLM, its scheduler, cache and kernels, in a process of its own: what `score_vllm` starts.

python -m benchmarks.accuracy.vllm_logits FOLDER_OF_THE_REFERENCE JSON_OF_ENGINE_ARGUMENTS

vLLM gives the log probabilities of a prompt's tokens, and would turn each into a Python object. What it computes them
from is taken where the model hands it over instead. In ipex-llm's environment it is ipex-llm's vLLM, whose arguments
have `load_in_low_bit`. The last line of the output begins with RESULT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.score import Reference, Score
from ipex_vllm.engines.vllm_devices import ONE_PROCESS

MARK = "RESULT "


def score_vllm(
    folder: Path,
    arguments: dict[str, Any],
    *,
    plugin: bool = True,
    environ: dict[str, str] | None = None,
    python: str = sys.executable,
) -> Score:
    """Score vLLM with these engine arguments against the reference in `folder`; without `plugin`, upstream's alone.

    `environ` are more variables for its process, `python` is the interpreter of its environment.

    Raises RuntimeError with the process's last words.
    """
    command = [python, "-m", __name__, str(folder), json.dumps(arguments)]
    # One process, so that the model can be reached.
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **(environ or {})}
    if not plugin:
        variables["VLLM_PLUGINS"] = ""
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Score(**json.loads(line.removeprefix(MARK)))
    raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")


def open_vllm(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The engine and its model."""
    from vllm import LLM

    own = {"distributed_executor_backend": ONE_PROCESS, "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1}
    llm = LLM(**{**own, **arguments})
    return llm, llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()


def open_ipex_llm(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The engine of ipex-llm 2.2.0 on vLLM 0.6.6, and its model."""
    from ipex_llm.vllm.cpu.engine import IPEXLLMClass

    llm = IPEXLLMClass(**arguments)
    return llm, llm.llm_engine.model_executor.driver_worker.model_runner.model


def main() -> None:
    folder, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    reference, score = Reference(folder), Score()
    length = reference.windows.shape[1]
    settings = {
        "max_model_len": length + 16,
        "max_num_batched_tokens": length + 16,
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    open_engine = open_ipex_llm if "load_in_low_bit" in arguments else open_vllm
    llm, model = open_engine({**settings, **arguments})
    compute_logits, index = model.compute_logits, 0

    def counted(hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits: torch.Tensor = compute_logits(hidden_states, *rest)
        # Those of the prompt, alone or, in vLLM 0.6.6, before that of the token that is generated.
        if len(logits) >= length - 1:
            reference.count(score, index, logits[: length - 1])
        return logits

    model.compute_logits = counted
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for index, window in enumerate(reference.windows):  # noqa: B007  (`counted` reads it)
        llm.generate({"prompt_token_ids": window.tolist()}, sampling, use_tqdm=False)
    assert score.num_tokens == reference.windows[:, 1:].numel(), "vLLM computed the prompts in parts"
    os.write(1, f"\n{MARK}{json.dumps(asdict(score))}\n".encode())


if __name__ == "__main__":
    main()
