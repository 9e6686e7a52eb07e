#!/usr/bin/env bash
# Builds the only vLLM that ipex-llm 2.2.0 runs on.
set -euo pipefail

"$(dirname "$0")/../drop-cuda.sh"
# uv, because pip refuses a source release whose build adds "+cpu" to its version. AVX-512 would have the build clone
# oneDNN, which only vLLM's own int8 kernels use.
VLLM_TARGET_DEVICE=cpu VLLM_CPU_DISABLE_AVX512=true \
    uv pip install --quiet --python "$(command -v python)" --no-deps --no-build-isolation \
    --no-binary vllm vllm==0.6.6.post1
python -c 'from ipex_llm.vllm.cpu.engine import IPEXLLMAsyncLLMEngine' >/dev/null
