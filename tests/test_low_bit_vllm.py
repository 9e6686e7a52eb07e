"""The quantization plugin inside upstream vLLM, against Transformers with the dequantized weights."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.low_bit import importance, vllm_arguments
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels.vllm_cpu import has_vnni, operators
from ipex_vllm.low_bit.layout import from_tensors
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.readers import ipex_llm
from ipex_vllm.low_bit.recipe import Recipe, Storage, on_load, on_save
from ipex_vllm.low_bit.save import save
from ipex_vllm.low_bit.vllm.config import CONFIGS
from tests.low_bit_logprobs import PROMPT
from tests.processes import Server

IPEX_LLM = Path(__file__).parent / "fixtures" / "ipex_llm_checkpoints"
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "initializer_range": 0.1,
}
# Two layers of four merged projections; the head comes to them.
LINEARS = 8


@dataclass(frozen=True)
class Result:
    """What vLLM made of a model, and what it wrote meanwhile."""

    value: list[float] | str
    log: str

    @property
    def logprobs(self) -> torch.Tensor:
        assert not isinstance(self.value, str), f"{self.value}\n{self.log[-4000:]}"
        return torch.tensor(self.value)


def run_vllm(arguments: dict[str, dict[str, object]], folder: Path, **environment: str) -> dict[str, Result]:
    """One process that opens one model after the other: starting it takes longer than all of them."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **environment,
    }
    command = [sys.executable, "-m", "tests.low_bit_logprobs", json.dumps([*arguments.values()])]
    log = folder / "log"
    with log.open("wb") as file:
        subprocess.run(command, stdout=file, stderr=file, env=variables, timeout=1100)
    logs = re.split(r"^RESULT (.*)\n", log.read_text(), flags=re.MULTILINE)
    assert len(logs) == 2 * len(arguments) + 1, logs[-1][-4000:]
    values = map(json.loads, logs[1::2])
    return {name: Result(*pair) for name, pair in zip(arguments, zip(values, logs[0::2], strict=False), strict=True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`qwen` has QKV with bias, a head that shares the embedding, and down projections of 160 inputs, or 80 a rank."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE))
    qwen = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "intermediate_size": 160, "tie_word_embeddings": True}))
    for layer in qwen.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(projection.bias, std=0.3)
    llama.bfloat16().save_pretrained(folder / "llama")
    qwen.bfloat16().save_pretrained(folder / "qwen")
    for name in ("sym_int4", "sym_int8", "fp8_e4m3"):
        save(str(folder / "llama"), FORMATS[name], folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Upstream vLLM with this package installed beside it."""
    llama, qwen = {"model": str(models["llama"])}, {"model": str(models["qwen"])}
    int4, int8 = {"quantization": "ipex_sym_int4"}, {"quantization": "ipex_sym_int8"}
    fp8 = {"quantization": "ipex_fp8_e4m3"}
    saved_int4, saved_int8 = {"model": str(models["sym_int4"])}, {"model": str(models["sym_int8"])}
    two_ranks = {"tensor_parallel_size": 2}
    arguments = {
        "sym_int4": {**llama, **int4},
        "sym_int4 float32": {**llama, **int4, "dtype": "float32"},
        "sym_int4, head left as it is": {**llama, **int4, "additional_config": {"ipex_vllm_head": "none"}},
        "sym_int4, outer layers apart": {**llama, **int4, "additional_config": {"ipex_vllm_outer": "asym_int4"}},
        "sym_int4, groups of 64": {**llama, **int4, "additional_config": {"ipex_vllm_group_size": 64}},
        "sym_int4 compiled": {**llama, **int4, "enforce_eager": False},
        "sym_int4 saved": saved_int4,
        "sym_int4 saved, two ranks": {**saved_int4, **two_ranks},
        "sym_int4 asked of sym_int8": {**saved_int8, **int4},
        "sym_int8": {**llama, **int8},
        "sym_int8 float32": {**llama, **int8, "dtype": "float32"},
        "sym_int8 compiled": {**llama, **int8, "enforce_eager": False},
        "sym_int8 saved": {**saved_int8, **int8},
        "sym_int8 saved, two ranks": {**saved_int8, **two_ranks},
        "fp8_e4m3": {**llama, **fp8},
        "fp8_e4m3 compiled": {**llama, **fp8, "enforce_eager": False},
        "fp8_e4m3 saved": {"model": str(models["fp8_e4m3"])},
        "qwen asym_int4": {**qwen, "quantization": "ipex_asym_int4"},
        "qwen sym_int4, two ranks": {**qwen, **int4, **two_ranks},
        "nf4": {**llama, "quantization": "ipex_nf4"},
        "fp6": {**llama, "quantization": "ipex_fp6", "dtype": "float32"},
    }
    for name in ("sym_int4", "sym_int8"):
        path = str(IPEX_LLM / name)
        arguments[f"ipex-llm's {name}"] = {"model": path, **vllm_arguments(None, path, "cpu")}
    return run_vllm(arguments, tmp_path_factory.mktemp("vllm"))


def reference(model: Path, weight_of: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(weight_of(name, module.weight.detach()))
    with torch.inference_mode():
        logits = network(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return logits[range(len(PROMPT) - 1), PROMPT[1:]]


# What vLLM computes as one layer shares its inputs' scales.
MERGED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


def rounded(weight: torch.Tensor, storage: Storage, inputs: torch.Tensor, is_saved: bool) -> torch.Tensor:
    group_size = storage.group_size or 0
    return dequantize(quantize(weight, storage.format, group_size, inputs, scales_inputs=not is_saved))


def quantized(
    model: Path,
    format_name: str,
    *,
    unless: str = "nothing",
    recipe: Recipe | None = None,
    is_saved: bool = False,
    num_ranks: int = 1,
) -> torch.Tensor:
    """The log-probabilities with the weights that `format_name` stands for, on load or as `save` writes them."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    importances = importance.measure(network)
    weights = {name: module.weight.detach() for name, module in network.named_modules() if type(module) is nn.Linear}
    recipe = recipe or (on_save if is_saved else on_load)(FORMATS[format_name])
    for first, weight in list(weights.items()):
        parent, _, last = first.rpartition(".")
        names = [f"{parent}.{part}" for part in MERGED[last]] if last in MERGED else [first]
        if last in ("k_proj", "v_proj", "up_proj") or unless in first:
            continue
        storage = recipe.storage(first, weight.shape[1], is_head=first == "lm_head")
        assert isinstance(storage, Storage)
        # A rank has its part of the outputs of most layers, of this one its part of the inputs.
        if last == "o_proj":
            pieces = zip(weight.chunk(num_ranks, 1), importances[first].chunk(num_ranks), strict=True)
            weights[first] = torch.cat([rounded(piece, storage, inputs, is_saved) for piece, inputs in pieces], 1)
            continue
        parts = [[weights[name].chunk(num_ranks)[rank] for name in names] for rank in range(num_ranks)]
        done = [
            rounded(torch.cat(part), storage, importances[first], is_saved).split([len(piece) for piece in part])
            for part in parts
        ]
        for index, name in enumerate(names):
            weights[name] = torch.cat([pieces[index] for pieces in done])
    return reference(model, lambda name, _: weights[name])


def assert_close(logprobs: torch.Tensor, expected: torch.Tensor, model: Path) -> None:
    """Activations are rounded to 8 bits; what is left must be well below what quantizing the weights changed."""
    unquantized = reference(model, lambda _, weight: weight)
    assert (logprobs - expected).abs().mean() < 0.06
    assert (logprobs - expected).norm() < 0.5 * (unquantized - expected).norm()


@pytest.mark.parametrize(
    "run", ["sym_int4", "sym_int4 float32", "sym_int4 compiled", "sym_int4 saved", "sym_int4 saved, two ranks"]
)
def test_four_bits(run: str, models: dict[str, Path], results: dict[str, Result]) -> None:
    expected = quantized(models["llama"], "sym_int4", is_saved="saved" in run)
    assert_close(results[run].logprobs, expected, models["llama"])
    assert f"sym_int4: {LINEARS} layers use the kernel w4a8" in results[run].log
    assert "sym_int8: 1 layers use the kernel w8a8" in results[run].log
    assert "Loading sym_int4: 100%" in results[run].log  # the progress bar


@pytest.mark.parametrize(
    "run", ["sym_int8", "sym_int8 float32", "sym_int8 compiled", "sym_int8 saved", "sym_int8 saved, two ranks"]
)
def test_eight_bits(run: str, models: dict[str, Path], results: dict[str, Result]) -> None:
    expected = quantized(models["llama"], "sym_int8", is_saved="saved" in run)
    assert (results[run].logprobs - expected).abs().mean() < 0.06
    assert f"sym_int8: {LINEARS + 1} layers use the kernel w8a8" in results[run].log


@pytest.mark.parametrize("run", ["fp8_e4m3", "fp8_e4m3 compiled", "fp8_e4m3 saved"])
def test_eight_bit_floats(run: str, models: dict[str, Path], results: dict[str, Result]) -> None:
    expected = quantized(models["llama"], "fp8_e4m3", is_saved="saved" in run)
    # The activations are not rounded to 8 bits.
    assert (results[run].logprobs - expected).abs().mean() < 0.02
    assert f"fp8_e4m3: {LINEARS} layers use the kernel w8a16" in results[run].log


def test_reopening_what_was_saved_changes_no_bit(models: dict[str, Path]) -> None:
    importances = importance.read(importance.of_checkpoint(str(models["llama"])))
    original, saved = ({}, {})
    for tensors, folder in ((original, "llama"), (saved, "sym_int4")):
        for file in models[folder].glob("*.safetensors"):
            tensors |= load_file(file)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        parts = {key.rpartition(".")[2]: value for key, value in saved.items() if key.startswith(f"{layer}.")}
        opened = from_tensors(FORMATS["sym_int4"], parts)
        written = quantize(original[f"{layer}.weight"], FORMATS["sym_int4"], None, importances[layer])
        assert torch.equal(dequantize(opened), dequantize(written))


@pytest.mark.parametrize("name", ["sym_int4", "sym_int8", "fp8_e4m3"])
def test_the_compiled_model_is_one_graph_and_agrees_with_the_eager_one(name: str, results: dict[str, Result]) -> None:
    compiled = results[f"{name} compiled"]
    # vLLM compiles ahead of time, which takes a whole graph and fails where it would break.
    assert "saved AOT compiled function" in compiled.log
    assert (compiled.logprobs - results[name].logprobs).abs().mean() < 0.06


def test_a_saved_checkpoint_is_refused_when_another_format_is_asked_of_it(results: dict[str, Result]) -> None:
    message = results["sym_int4 asked of sym_int8"].value
    assert isinstance(message, str)
    assert "already quantized (sym_int8): leave --quantization ipex_sym_int4 out" in message


def test_the_head_may_stay_as_it_is(models: dict[str, Path], results: dict[str, Result]) -> None:
    run = results["sym_int4, head left as it is"]
    assert_close(run.logprobs, quantized(models["llama"], "sym_int4", unless="lm_head"), models["llama"])
    assert "not quantized: lm_head (left as it is)" in run.log


def test_the_outer_layers_may_have_a_format_of_their_own(models: dict[str, Path], results: dict[str, Result]) -> None:
    run = results["sym_int4, outer layers apart"]  # both layers that there are
    recipe = on_load(FORMATS["sym_int4"], outer="asym_int4", num_layers=SHAPE["num_hidden_layers"])
    assert_close(run.logprobs, quantized(models["llama"], "sym_int4", recipe=recipe), models["llama"])
    assert f"asym_int4: {LINEARS} layers use the kernel w4a8" in run.log


def test_the_group_size_may_be_chosen(models: dict[str, Path], results: dict[str, Result]) -> None:
    run, other = results["sym_int4, groups of 64"], results["sym_int4"]
    expected = quantized(models["llama"], "sym_int4", recipe=on_load(FORMATS["sym_int4"], group_size=64))
    assert_close(run.logprobs, expected, models["llama"])
    assert not torch.equal(run.logprobs, other.logprobs)


def test_bias_and_tied_head(models: dict[str, Path], results: dict[str, Result]) -> None:
    run = results["qwen asym_int4"]
    assert_close(run.logprobs, quantized(models["qwen"], "asym_int4"), models["qwen"])
    assert f"asym_int4: {LINEARS} layers use the kernel w4a8" in run.log


def test_two_ranks_leave_a_layer_that_they_cannot_split_as_it_is(
    models: dict[str, Path], results: dict[str, Result]
) -> None:
    run = results["qwen sym_int4, two ranks"]
    expected = quantized(models["qwen"], "sym_int4", unless="down_proj", num_ranks=2)
    assert_close(run.logprobs, expected, models["qwen"])
    reason = "80 inputs are no multiple of the group size 32"
    assert f"not quantized: model.layers.0.mlp.down_proj and 1 more ({reason})" in run.log
    assert f"sym_int4: {LINEARS - 2} layers use the kernel w4a8" in run.log


@pytest.mark.parametrize("name", ["sym_int4", "sym_int8"])
def test_what_ipex_llm_saved_is_served(name: str, results: dict[str, Result]) -> None:
    tensors = dict(ipex_llm.read(IPEX_LLM / name))

    def weight_of(layer: str, _: torch.Tensor) -> torch.Tensor:
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{layer}.")}
        return dequantize(from_tensors(FORMATS[name], parts))

    expected = reference(IPEX_LLM / "original", weight_of)
    assert (results[f"ipex-llm's {name}"].logprobs - expected).abs().mean() < 0.06


def test_a_slow_format_is_served_and_says_what_it_costs(models: dict[str, Path], results: dict[str, Result]) -> None:
    run = results["fp6"]
    assert_close(run.logprobs, quantized(models["llama"], "fp6"), models["llama"])
    assert f"fp6: {LINEARS} layers use the kernel dequantize, which saves memory but no time" in run.log


def test_the_levels_of_a_table_have_a_kernel(models: dict[str, Path], results: dict[str, Result]) -> None:
    run = results["nf4"]
    assert_close(run.logprobs, quantized(models["llama"], "nf4"), models["llama"])
    assert f"nf4: {LINEARS} layers use the kernel w4a8" in run.log


def test_a_vllm_without_this_package_opens_what_was_saved(models: dict[str, Path], tmp_path: Path) -> None:
    # Its fp8 matmul rounds the activations too, to 8-bit floats with 3 bits of mantissa.
    allowed = {"fp8_e4m3": 0.12}
    if "cpu_gemm_wna16" in operators():  # which its library for AVX2 alone has not
        allowed["sym_int4"] = 0.06
    if has_vnni():  # without it oneDNN, which it multiplies by, cuts sums off
        allowed["sym_int8"] = 0.06
    arguments: dict[str, dict[str, object]] = {name: {"model": str(models[name])} for name in allowed}
    for name, run in run_vllm(arguments, tmp_path, VLLM_PLUGINS="").items():
        expected = quantized(models["llama"], name, is_saved=True)
        assert (run.logprobs - expected).abs().mean() < allowed[name]
        assert "quantization=compressed-tensors" in run.log


def test_every_format_has_a_config_that_another_process_can_unpickle() -> None:
    configs = {config.get_name(): config() for config in CONFIGS}
    assert set(configs) == {f"ipex_{row.name}" for row in FORMATS.values() if row.kind != "dtype"}
    code = "import pickle, sys; print(*(config.get_name() for config in pickle.load(sys.stdin.buffer)))"
    data = pickle.dumps([*configs.values()])
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().split() == [*configs]


def test_upstreams_own_server_serves_a_format(tmp_path: Path) -> None:
    model = resolve_model_path("demo")
    flags = ("--quantization", "ipex_sym_int4", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "m")
    small = ("--kv-cache-memory-bytes", str(1 << 26), "--gpu-memory-utilization", "0.1")
    question = {"role": "user", "content": "I want to import the itervaluerefs method. How?"}
    module = "vllm.entrypoints.openai.api_server"
    with Server(tmp_path / "server", "/health", module, "--model", str(model), *flags, *small) as server:
        body = {"model": "m", "messages": [question], "temperature": 0, "max_tokens": 32}
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json=body, trust_env=False, timeout=60).raise_for_status().json()
        assert "from weakref import WeakValueDictionary" in answer["choices"][0]["message"]["content"]
        assert "layers use the kernel w4a8" in server.output


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="only AMX has registers to ask for")
@pytest.mark.parametrize(("plugins", "status"), [("", -signal.SIGILL), ("ipex_vllm_low_bit", 0)])
def test_upstream_alone_does_not_ask_for_amx(plugins: str, status: int, models: dict[str, Path]) -> None:
    """Where the first of these two fails, `upstream.allow_amx` is no longer needed."""
    code = """if __name__ == "__main__":
    import sys
    from vllm import LLM, SamplingParams
    small = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 24, "gpu_memory_utilization": 0.1}
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **small)
    sampling = SamplingParams(max_tokens=4, detokenize=False)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, sampling, use_tqdm=False)
    """
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": plugins, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(models["llama"])]
    done = subprocess.run(command, env=variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, capture_output=True)
    assert done.returncode == status, done.stderr[-2000:]


def test_upstream_alone_does_not_load_what_it_compiled() -> None:
    """Where this fails, `upstream.load_compiled` is no longer needed."""
    code = """import inspect
from types import SimpleNamespace
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Compiled
from vllm.compilation import decorators
assert "compiled_fn.finalize_loading(" in inspect.getsource(decorators._try_load_aot_compiled_fn)
print(hasattr(Compiled(SimpleNamespace(serialize=None)), "finalize_loading"))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
