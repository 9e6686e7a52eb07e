"""What of vLLM and torchvision is put right, and that it still is wrong there: where it is not, the mend can go."""

import ast
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch._inductor.cpu_vec_isa import VecAVX2, VecISA
from torch.distributed import Store
from torchvision.extension import _has_ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models import registry
from vllm.v1.sample import sampler

from ipex_vllm import fastchat_requests
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.recipe import on_load
from ipex_vllm.low_bit.vllm import upstream
from ipex_vllm.low_bit.vllm.config import CONFIGS
from ipex_vllm.low_bit.vllm.linear import EmbeddingMethod
from ipex_vllm.low_bit.vllm.progress import Progress
from tests.support import free_port

NUM_TOKENS, NUM_HEADS, HEAD_SIZE = 5, 4, 32


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_torchvision_is_imported_beside_pytorchs_cpu_build_by_whatever_imports_it_first() -> None:
    resize = (
        "import torchvision.transforms.v2.functional as v; print(v.resize(torch.ones(3, 8, 8), [4, 4]).sum().item())"
    )
    assert "48.0" in run(f"import torch, ipex_vllm; {resize}")
    assert "48.0" in run(f"import torch; {resize}"), "`make` sets up every program of the environment"


def test_torchvision_still_needs_its_operators_defined() -> None:
    without = "import sys; sys.meta_path = [f for f in sys.meta_path if 'DefineBeforeImport' not in repr(f)]"
    assert _has_ops() or "operator torchvision::nms does not exist" in run(f"{without}; import torchvision")


def rotary() -> tuple[RotaryEmbedding, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = RotaryEmbedding(HEAD_SIZE, HEAD_SIZE, 64, 10000.0, True, torch.float32)
    query = torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_SIZE)
    key = torch.randn(NUM_TOKENS, 1, HEAD_SIZE)
    return layer, torch.arange(NUM_TOKENS), query, key


def test_heads_in_a_dimension_of_their_own_are_rotated_as_those_beside_each_other() -> None:
    layer, positions, query, key = rotary()
    expected_query, expected_key = layer.forward_native(positions, query.flatten(1), key.flatten(1))
    rotated_query, rotated_key = upstream.rotate_heads(layer, positions, query.clone(), key.clone())
    assert torch.allclose(rotated_query.flatten(1), expected_query, atol=1e-6)
    assert rotated_key is not None
    assert torch.allclose(rotated_key.flatten(1), expected_key, atol=1e-6)
    flat_query, _ = upstream.rotate_heads(layer, positions, query.flatten(1), key.flatten(1))
    assert torch.allclose(flat_query, expected_query, atol=1e-6)


def test_vllm_still_rotates_heads_in_a_dimension_of_their_own_wrongly() -> None:
    layer, positions, query, key = rotary()
    expected, _ = layer.forward_native(positions, query, key)
    rotated, _ = upstream.rotate(layer, positions, query.clone(), key.clone())
    assert not torch.allclose(rotated, expected, atol=1e-3)


def xielu_of_two(make: Callable[[XIELU], None]) -> float:
    """What an activation that `make` initialises has for 2: a² softplus(p) + a / 2, as Apertus has it."""
    layer = XIELU.__new__(XIELU)
    make(layer)
    layer.alpha_p.data = torch.tensor([0.3125]).to(layer.alpha_p.dtype)
    with torch.inference_mode():
        return float(layer.forward_native(torch.tensor([2.0])))


def test_xielu_is_computed_in_the_models_dtype() -> None:
    exact = 4 * math.log(1 + math.exp(0.3125)) + 1
    assert xielu_of_two(upstream.make_xielu_in_models_dtype) == pytest.approx(exact, abs=1e-6)
    assert abs(xielu_of_two(upstream.make_xielu) - exact) > 1e-3, "vLLM needs this no more"


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
BIAS = torch.tensor([0.0, 0.0, 0.0, 5.0])


def router(scoring_func: str) -> CPURouter:
    return CPURouter(
        2, 4, scoring_func=scoring_func, e_score_correction_bias=BIAS, renormalize=False, routed_scaling_factor=2.0
    )


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_correction_bias_chooses_experts_and_does_not_weigh_them(scoring_func: str) -> None:
    scores = LOGITS.softmax(-1) if scoring_func == "softmax" else LOGITS.sigmoid()
    weights, ids = upstream.route_with_bias(router(scoring_func), LOGITS, LOGITS, None)
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen == pytest.approx({3: 2 * scores[0, 3].item(), 0: 2 * scores[0, 0].item()})


def test_vllm_still_leaves_the_correction_bias_out() -> None:
    _, ids = upstream.route(router("softmax"), LOGITS, LOGITS, None)
    assert sorted(ids[0].tolist()) == [0, 1]
    with pytest.raises(AssertionError):
        upstream.route(router("sigmoid"), LOGITS, LOGITS, None)


def test_a_head_is_quantized_though_its_model_does_not_hand_the_configuration_on(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def make(self, size, width, dtype=None, original=None, padding=64, quant_config=None, prefix="", quant_method=None):
        seen.append(quant_config)

    monkeypatch.setattr(upstream, "make_embedding", make)
    layer = object()
    upstream.make_embedding_with_config(layer, 64, 128, prefix="lm_head")
    vllm_config.quant_config = ours = CONFIGS[0]()
    upstream.make_embedding_with_config(layer, 64, 128, prefix="lm_head")
    upstream.make_embedding_with_config(layer, 64, 128, None, None, 64, None, "lm_head")
    upstream.make_embedding_with_config(layer, 64, 128, quant_config="its own")
    upstream.make_embedding_with_config(layer, 64, 128, quant_method="its own")
    vllm_config.quant_config = object()  # another method than ours
    upstream.make_embedding_with_config(layer, 64, 128)
    assert seen == [None, ours, ours, "its own", None, None]


@pytest.mark.parametrize("head", [None, "none"])
def test_an_embedding_that_is_the_head_is_multiplied_with_in_the_heads_format(head: str | None) -> None:
    recipe = on_load(FORMATS["sym_int4"], head)
    method = EmbeddingMethod(recipe, Progress(recipe.format), "")
    layer = torch.nn.Module()
    torch.manual_seed(0)
    method.create_weights(layer, 128, [64], 128, 64, torch.float32)
    layer.weight.data.normal_()
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 128)
    exact = x @ layer.weight.T
    error = (method.apply(layer, x) - exact).abs().max() / exact.std()
    assert (error < 1e-6) if head == "none" else (1e-4 < error < 0.05)
    assert torch.equal(method.embedding(layer, torch.tensor([5])), layer.weight[5:6])


MODELS_WITHOUT = {
    "ParallelLMHead": ("gpt_oss", "qwen3_next", "falcon_h1", "mamba2", "bloom", "opt"),
    "VocabParallelEmbedding": ("gemma2", "commandr"),
}


@pytest.mark.parametrize(
    ("layer", "name"), [(layer, name) for layer, names in MODELS_WITHOUT.items() for name in names]
)
def test_vllms_model_still_does_not_hand_it_on(layer: str, name: str) -> None:
    source = (Path(upstream.cpu_router.__file__).parents[3] / "models" / f"{name}.py").read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    makes = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == layer]
    assert any("quant_config" not in [keyword.arg for keyword in call.keywords] for call in makes)


def test_vllms_cpu_library_still_has_no_state_space_operator_of_the_first_kind() -> None:
    """Where this fails, `plan.cpu.MAMBA_1` is no longer needed."""
    import vllm._custom_ops  # noqa: F401

    assert not hasattr(torch.ops._C, "selective_scan_fwd")


def listening_addresses(make: Callable[..., Store]) -> set[str]:
    """Where the store of a group listens that `make` has made for 127.0.0.1."""
    port = free_port()
    store = make("127.0.0.1", port, 0, 1, timedelta(seconds=30))
    store.set("key", "value")
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_the_store_of_several_hosts_listens_where_it_is_told() -> None:
    upstream.mend()
    assert listening_addresses(upstream.rendezvous._create_c10d_store) == {"127.0.0.1"}
    assert listening_addresses(upstream.make_store) == {"::"}, "upstream's still listens on all addresses"


@pytest.mark.parametrize("name", [*fastchat_requests.RENAMED, *fastchat_requests.NOWHERE])
def test_vllms_openai_api_still_drops_what_a_refusal_does_not_send_there(name: str) -> None:
    assert name not in ChatCompletionRequest.model_fields
    assert set(fastchat_requests.RENAMED.values()) <= ChatCompletionRequest.model_fields.keys()


@pytest.mark.skipif(
    not hasattr(torch.ops._C, "causal_conv1d_fwd_cpu"), reason="vLLM's library for this CPU has no such operator"
)
def test_the_convolution_of_gated_linear_attention_still_refuses_a_token_by_its_strides() -> None:
    """Once it does not, `convolve_even_one` is not needed; the matrix's Qwen3.5 begins with a prompt of one token."""
    rows = torch.randn(2, 64, dtype=torch.bfloat16)
    weight = torch.randn(64, 4, dtype=torch.bfloat16)

    def convolve(x: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        starts, states = torch.tensor([0, x.shape[1]], dtype=torch.int32), torch.zeros(2, 64, 3, dtype=torch.bfloat16)
        options = {"query_start_loc": starts, "cache_indices": torch.tensor([1], dtype=torch.int32)}
        options |= {"has_initial_state": torch.tensor([False]), "silu_activation": True, "is_weight_packed": False}
        return function(x=x, weight=weight, bias=None, conv_states=states, **options)

    both = convolve(rows.t(), upstream.convolve)
    one = rows[:1].t().clone(memory_format=torch.contiguous_format)  # strides as Qwen3.5 hands them over
    assert torch.equal(convolve(one, upstream.convolve_even_one)[:, 0], both[:, 0])
    with pytest.raises(RuntimeError, match="expect x to be transposed"):
        convolve(one, upstream.convolve)


def test_pytorch_loads_a_library_in_another_process_for_each_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it does not, or asks the compiler itself, `ask_compiler` can go."""
    started: list[list[str]] = []
    run = subprocess.run

    def noted(command: list[str], **options: object) -> object:
        started.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", noted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert upstream.probe(VecAVX2(), VecISA._avx_code)
    assert any(command[0] == sys.executable for command in started)
    started.clear()
    assert upstream.ask_compiler(VecAVX2(), VecISA._avx_code)
    assert not any(command[0] == sys.executable for command in started)


def test_an_instruction_set_that_the_compiler_does_not_know_is_not_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VecAVX2, "_arch_flags", "-mavx2 -mavx4096")
    assert not upstream.ask_compiler(VecAVX2(), VecISA._avx_code)


def test_a_models_class_is_looked_at_in_this_process() -> None:
    upstream.mend()
    assert registry._run_in_subprocess(os.getpid) == os.getpid()
    assert upstream.call_elsewhere(os.getpid) != os.getpid(), "vLLM's own way, which imports vLLM once more"


def test_ranks_are_still_compiled_at_the_first_request_that_asks_for_them() -> None:
    """Once they are not, `upstream.mend` need not touch them."""
    assert hasattr(upstream.rank_compiled, "_torchdynamo_orig_callable")
    upstream.mend()
    assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")
    logprobs = torch.tensor([[-1.0, -3.0, -2.0], [-0.5, -0.25, -4.0]])
    chosen = torch.tensor([[-3.0], [-0.25]])
    assert sampler.batched_count_greater_than(logprobs, chosen).tolist() == [3, 1]


def test_what_is_compiled_is_kept_for_this_code_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.mend()
    config = VllmConfig()
    kept_under = config.compute_hash()
    assert kept_under == VllmConfig().compute_hash()
    assert len(kept_under) == len(upstream.hash_config(config))
    monkeypatch.setattr(upstream, "own_code", lambda: "another version's")
    assert config.compute_hash() != kept_under
