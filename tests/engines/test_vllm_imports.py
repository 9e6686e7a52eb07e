"""What an import of vLLM leaves out, and that nothing misses it. In processes of their own: here all is imported."""

from __future__ import annotations

import subprocess
import sys

LOWERING = "torch._inductor.lowering"


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_an_engine_is_imported_without_the_compilers_lowering_until_something_compiles():
    """As a worker does it; then, as vLLM itself does it, the compiler's list has vLLM's operators."""
    code = (
        "import sys, torch\n"
        "from ipex_vllm.engines.vllm_imports import import_vllm\n"
        "import_vllm()\n"
        "from vllm.v1.engine.async_llm import AsyncLLM\n"
        "import ipex_vllm.engines.vllm_drafts, ipex_vllm.low_bit.vllm.upstream, vllm.v1.worker.cpu_worker\n"
        f"print({LOWERING!r} in sys.modules)\n"
        "from torch._inductor.compile_fx import get_patched_config_dict\n"
        "from torch._inductor import graph, lowering\n"
        "allowed = graph.FALLBACK_ALLOW_LIST\n"
        "print('vllm::anything' in allowed, allowed is lowering.FALLBACK_ALLOW_LIST)\n"
        "inductor = torch._TorchCompileInductorWrapper('default', {'max_autotune': True}, None)\n"
        "settings = inductor.get_compiler_config()\n"
        "print(settings['max_autotune'], settings == get_patched_config_dict(config_patches=inductor.config))\n"
    )
    assert run(code).splitlines()[-3:] == ["False", "True True", "True True"]


def test_vllm_and_pytorch_alone_still_import_it():
    """When one of these is false, that half of `import_vllm` is no longer needed."""
    after_vllm = f"import sys, vllm; print({LOWERING!r} in sys.modules)"
    after_a_decorator = f"import sys, torch; torch.compile(lambda x: x); print({LOWERING!r} in sys.modules)"
    assert [run(code).split()[-1] for code in (after_vllm, after_a_decorator)] == ["True", "True"]
