"""The log-probability that vLLM gives each token of a fixed prompt: python -m tests.low_bit_logprobs JSON.

JSON is a list of vLLM's engine arguments, for one model after the other. After each, a line begins with RESULT and
holds, as JSON, the log-probabilities, or the error's message. Beside vLLM's arguments there are `exact`, for the kernel
that rounds no activations, and `prompt`, for other token ids. A line with WEIGHT_BYTES says what a rank's model holds.
"""

import json
import os
import sys

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

from ipex_vllm.low_bit import linear
from ipex_vllm.low_bit.kernels.dequantize import DequantizingLinear

PROMPT = [(7 * i * i + 3) % 128 for i in range(40)]
KERNELS = linear.KERNELS
SETTINGS = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 24,
    "gpu_memory_utilization": 0.1,
    "skip_tokenizer_init": True,
}


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, each piece of memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def logprobs(arguments: dict[str, object]) -> list[float]:
    prompt = arguments.pop("prompt", PROMPT)
    linear.KERNELS = (DequantizingLinear,) if arguments.pop("exact", False) else KERNELS
    llm = LLM(**{**SETTINGS, **arguments})
    print("WEIGHT_BYTES", llm.apply_model(weight_bytes)[0], flush=True)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
    llm.llm_engine.engine_core.shutdown()
    return [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]


def main() -> None:
    # vLLM looks at each class of models in a process of its own, for the sake of CUDA; here that only takes long.
    registry._run_in_subprocess = lambda look: look()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function to be sent to a rank
    for arguments in json.loads(sys.argv[1]):
        result: list[float] | str
        try:
            result = logprobs(arguments)
        except Exception as error:
            result = str(error)
        cleanup_dist_env_and_memory()
        # Past Python's buffers, in the order in which vLLM's processes write to the same file.
        os.write(1, f"\nRESULT {json.dumps(result)}\n".encode())


if __name__ == "__main__":
    main()
