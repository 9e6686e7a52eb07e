"""GGUF: broken files, blocks as weights, and each architecture's weights and configuration, without vLLM."""

import contextlib
import importlib.metadata
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ipex_vllm.demo import smollm2_file
from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit import gguf_directory, vllm_arguments
from ipex_vllm.low_bit.kernels import w8a8
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize
from ipex_vllm.low_bit.readers import ggml, gguf
from ipex_vllm.low_bit.readers.gguf_config import config_of, llama3_parameters
from ipex_vllm.low_bit.rows import Rows
from ipex_vllm.machine.gguf import BLOCKS, find_files, read_header
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import model_name
from ipex_vllm.worker import model_directory
from tests.gguf_files import MODELS, make_model, to_blocks, write
from tests.support import FakeEngine

EXACT = {"f32", "f16", "bf16", "q4_0", "q4_1", "q8_0", "q5_0", "iq4_nl", "mxfp4"}
TOKENS = [(7 * index * index + 3) % 128 for index in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("number", BLOCKS)
def test_blocks_become_the_weights_that_they_stand_for(number: int) -> None:
    kind, ggmls = BLOCKS[number][0], Kind(number)
    weight = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    blocks = to_blocks(weight, ggmls)
    expected = torch.from_numpy(quants.dequantize(blocks, ggmls).astype(np.float32)).view(8, 512)
    rows = torch.from_numpy(blocks.view(np.uint8).copy())
    assert torch.allclose(ggml.dequantize(kind, rows), expected, rtol=2**-10, atol=1e-3 if kind == "q4_k" else 0)
    decoded = ggml.decode(kind, rows)
    got = decoded.float() if isinstance(decoded, torch.Tensor) else dequantize(decoded)
    name = "none" if isinstance(decoded, torch.Tensor) else decoded.format.name
    assert name == ggml.format_of(kind)
    if kind in EXACT:
        assert torch.equal(got, expected)
    else:
        # A group's scale in float16, or 255 steps instead of at most 64.
        assert (got - expected).norm() < (0.0005 if kind == "q4_k" else 0.006) * expected.norm()


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_read_from_its_file_is_the_model_that_was_written(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    write(
        tmp_path / "model.gguf", architecture, model, gpt_oss_kinds if architecture == "gpt-oss" else lambda _: Kind.F32
    )
    directory = gguf_directory(str(tmp_path / "model.gguf"))
    assert directory is not None
    config = AutoConfig.from_pretrained(directory)
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    read = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    read.load_state_dict(state_dict(directory, read), strict=not config.tie_word_embeddings)
    with torch.inference_mode():
        expected, got = (each(torch.tensor([TOKENS])).logits for each in (model, read))
    assert torch.allclose(got, expected, atol=1e-4)


def state_dict(directory: Path, model: Any) -> dict[str, torch.Tensor]:
    """What the reader yields, by the names of Transformers' parameters."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in gguf.read(directory):
        module, _, end = name.rpartition(".")
        if end.startswith("blocks_"):
            state[f"{module}.weight"] = ggml.dequantize(end.removeprefix("blocks_"), tensor)
        elif tensor.dtype == torch.uint8:  # of gpt-oss' experts, whose gate comes before up, under one name
            state[name] = torch.cat((state[name], tensor)) if name in state else tensor
        else:
            state[name] = tensor.float()
    for name, parameter in model.named_parameters():
        if ".experts." in name and model.config.model_type == "gpt_oss":
            if not name.endswith("bias"):
                state[name] = gpt_oss_experts(state, name, len(parameter))
        elif ".experts." in name:
            parent, _, last = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            experts = range(len(parameter))
            each = [torch.cat([state.pop(f"{parent}.{expert}.{part}.weight") for part in parts]) for expert in experts]
            state[name] = torch.stack(each)
    return state


def gpt_oss_kinds(name: str) -> Kind:
    return Kind.MXFP4 if "_exps" in name else Kind.F32


def gpt_oss_experts(state: dict[str, torch.Tensor], name: str, num_experts: int) -> torch.Tensor:
    """The stacked experts called `name` of what comes one by one: gate above up, which are in turn there."""
    parent, _, last = name.rpartition(".")
    part = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}[last]
    rows = [ggml.dequantize("mxfp4", state.pop(f"{parent}.{expert}.{part}")) for expert in range(num_experts)]
    if last == "gate_up_proj":
        rows = [torch.stack(both.chunk(2), dim=1).flatten(0, 1) for both in rows]
    return torch.stack(rows).mT


def test_llama_3s_scaling_is_what_its_divisors_say() -> None:
    def divisors(factor: float, low: float, high: float, original: float) -> list[float]:
        wavelengths = [2 * np.pi * 500000 ** (index / 64) for index in range(64)]
        smooths = [min(max((original / length - low) / (high - low), 0), 1) for length in wavelengths]
        return [1 / ((1 - smooth) / factor + smooth) for smooth in smooths]

    for factor, low, high, original in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 8.0, 4096)):
        found = llama3_parameters(divisors(factor, low, high, original), 500000.0)
        assert found == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": pytest.approx(high, abs=1e-3),
            "original_max_position_embeddings": original,
        }
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is none that"):
        llama3_parameters([1.0, 3.0, 2.0, 5.0, 1.0], 10000.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, "llama", make_model("llama"), lambda _: Kind.Q4_0)
    return path


def broken(data: bytes, how: str) -> bytes:
    tensors = struct.pack("<Q", int.from_bytes(data[8:16], "little"))
    entry = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")  # its dimensions, type and offset follow
    changes = {
        "empty": b"",
        "another file": b"PK\3\4" + data[4:],
        "an old version": data[:4] + struct.pack("<I", 1) + data[8:],
        "cut in its header": data[:24] + data[24:400],
        "cut in its tensors": data[:-4096],
        "tensors without end": data[:8] + struct.pack("<Q", 1 << 60) + data[16:],
        "metadata without end": data[:8] + tensors + struct.pack("<Q", 1 << 60) + data[24:],
        "a long key": data[:24] + struct.pack("<Q", 1 << 62) + data[32:],
        "dimensions without end": data[:entry] + struct.pack("<I", 1 << 31) + data[entry + 4 :],
        "an unknown type": data[: entry + 20] + struct.pack("<I", 77) + data[entry + 24 :],
        "an offset past the end": data[: entry + 24] + struct.pack("<Q", 1 << 50) + data[entry + 32 :],
        "a huge shape": data[: entry + 4] + struct.pack("<QQ", 1 << 40, 1 << 40) + data[entry + 20 :],
        "another architecture": data.replace(b"llama", b"mamba"),
        "a tensor less": data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
        "another shape": data.replace(
            b"llama.feed_forward_length" + struct.pack("<II", 4, 256),
            b"llama.feed_forward_length" + struct.pack("<II", 4, 128),
        ),
        "no tokens": data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.takens"),
    }
    return changes[how]


MESSAGES = {
    "empty": "no readable GGUF file: cannot mmap an empty file",
    "another file": "it does not start with GGUF",
    "an old version": "it is of version 1",
    "cut in its header": "it ends after 400 bytes, in the middle of its header",
    "cut in its tensors": "does not lie inside the file",
    "tensors without end": "entries follow, for which it is too short",
    "metadata without end": "entries follow, for which it is too short",
    "a long key": "in the middle of its header",
    "dimensions without end": "has 2147483648 dimensions",
    "an unknown type": "is of ggml's type 77; readable are f32, f16, q4_0",
    "an offset past the end": "does not lie inside the file",
    "a huge shape": "does not lie inside the file",
    "another architecture": "models of architecture 'mamba' are not read; llama, qwen2",
    "a tensor less": "blk.1.ffn_xx.weight, which is not read",
    "another shape": "where its metadata say (128, 128)",
    "no tokens": "its metadata has no tokenizer",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_broken_file_is_told_in_one_line(how: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(broken(file.read_bytes(), how))
    with pytest.raises(ValueError, match=re.escape(MESSAGES[how])) as told:
        gguf_directory(str(path))
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_no_file_that_differs_in_one_byte_of_its_header_crashes(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    path = tmp_path / "changed.gguf"
    end = read_header([file]).tensors["token_embd.weight"].start
    for at in random.integers(0, min(end, 6000), 200):
        changed = bytearray(data)
        changed[at] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            config_of(read_header([path]))


def test_a_worker_ends_with_one_line_over_a_broken_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-4096])
    command = [sys.executable, "-m", "ipex_vllm.worker", "--model-path", str(tmp_path / "cut.gguf"), "--explain"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "--model-path" in last
    assert "cut off?" in last
    assert "Traceback" not in done.stderr


def test_an_engine_that_does_not_read_gguf_says_so(file: Path) -> None:
    assert model_directory(FakeEngine, "some/name") == "some/name"
    with pytest.raises(OptionError, match="GGUF files are read by --engine vllm, not by fake"):
        model_directory(FakeEngine, str(file))


def test_directories_and_split_files(file: Path, tmp_path: Path) -> None:
    assert find_files(str(file)) == find_files(str(file.parent)) == [file]
    assert find_files(str(tmp_path)) == find_files("some/name") == []
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts[0].write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"lacks m-00002-of-00002\.gguf, one of the 2 files"):
        find_files(str(parts[0]))
    parts[1].write_bytes(file.read_bytes())
    assert find_files(str(parts[1])) == find_files(str(tmp_path)) == parts
    (tmp_path / "mmproj-m.gguf").write_bytes(b"")
    assert find_files(str(tmp_path)) == parts
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several models \(m-00001-of-00002.gguf, other.gguf, \.\.\.\)"):
        find_files(str(tmp_path))
    assert model_name(str(tmp_path / "other.gguf")) == "other"


def test_a_split_model_is_that_of_one_file(file: Path, tmp_path: Path) -> None:
    """Its second part has tensors of its own and no metadata; here by moving the names of half of them."""
    data = file.read_bytes()
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts[0].write_bytes(data.replace(b"blk.1.", b"blk.0."))
    parts[1].write_bytes(data.replace(b"blk.0.", b"blk.1.").replace(b"general.architecture", b"general.architectura"))
    header = read_header(parts)
    assert header.metadata["general.architecture"] == "llama"
    assert {name: tensor.file for name, tensor in header.tensors.items() if name.startswith("blk.0")} == {
        name: parts[0] for name in header.tensors if name.startswith("blk.0")
    }
    assert {tensor.file for name, tensor in header.tensors.items() if name.startswith("blk.1")} == {parts[1]}


def test_the_directory_says_what_became_of_the_weights_and_is_written_once(file: Path) -> None:
    directory = gguf_directory(str(file))
    assert directory is not None
    written = (directory / "config.json").stat().st_mtime_ns
    assert gguf_directory(str(file)) == directory
    assert (directory / "config.json").stat().st_mtime_ns == written
    facts = ModelFacts.read(str(directory))
    assert facts.quantization == "16 q4_0 as sym_int4, 6 f32 as they are"
    assert facts.weight_bytes == file.stat().st_size
    arguments = {"quantization": "ipex_gguf", "load_format": "ipex_gguf"}
    assert vllm_arguments(None, str(directory), "cpu") == arguments
    assert vllm_arguments("fp32", str(directory), "cpu") == {**arguments, "dtype": "float32"}
    with pytest.raises(ValueError, match=r"already quantized \(GGUF: 16 q4_0 as sym_int4.*leave --low-bit out"):
        vllm_arguments("sym_int8", str(directory), "cpu")
    with pytest.raises(ValueError, match="no kernel on XPU"):
        vllm_arguments(None, str(directory), "xpu")


@pytest.mark.parametrize(("kind", "group"), [(Kind.Q8_0, 32), (Kind.Q4_1, 32), (Kind.Q4_0, 32)])
def test_rows_of_an_embedding(kind: Kind, group: int) -> None:
    blocks = to_blocks(np.random.default_rng(0).standard_normal((70, 128)).astype(np.float32), kind)
    weight = ggml.decode(kind.name.lower(), torch.from_numpy(blocks))
    assert isinstance(weight, QuantizedWeight)
    ids = torch.tensor([[0, 31, 32], [69, 5, 64]])
    expected = dequantize(weight)[ids]
    assert torch.equal(Rows(weight).rows(ids), expected)
    if weight.format.name == "sym_int8":
        packed = w8a8.pack(weight.codes, weight.scales)
        assert torch.equal(w8a8.rows(packed, ids, 128, group), expected)


def test_smollm2s_tokenizer_template_and_special_tokens() -> None:
    directory = gguf_directory(str(smollm2_file()))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Hello world! It's 2026, 12345 + 67 = ?\n\n  def f(x):\n\treturn x**2  ünï 東京"
    file = smollm2_file()
    ids = tokenizer(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": [2]}


def test_nothing_that_smollm2s_package_asks_for_is_installed() -> None:
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    assert not installed & {"llm", "llama-cpp-python"}
