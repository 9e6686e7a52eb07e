"""What Transformers 5 wrote, in the spelling of Transformers 4."""

import json
from pathlib import Path

from ipex_vllm.engines.older_transformers import older_config, older_tokenizer_config, readable_model


def test_config_of_transformers_5_becomes_that_of_transformers_4() -> None:
    modern = {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "partial_rotary_factor": 0.5},
        "hidden_size": 64,
    }
    assert older_config(modern) == {
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "hidden_size": 64,
    }
    default = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert older_config(default) == {"rope_theta": 1e4}


def test_what_transformers_4_wrote_stays_as_it_is() -> None:
    config = {"torch_dtype": "float16", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert older_config(config) == config
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<a>"]}
    assert older_tokenizer_config(tokenizer_config) == tokenizer_config


def test_tokenizer_config_of_transformers_5_becomes_that_of_transformers_4() -> None:
    assert older_tokenizer_config({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }


def test_a_models_files_are_linked_under_its_own_path_and_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "Qwen2-tiny"
    source.mkdir()
    (source / "config.json").write_text('{"dtype": "bfloat16"}')
    (source / "tokenizer_config.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_bytes(b"weights")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    copy = Path(readable_model(str(source), tmp_path / "copies"))
    assert str(copy).endswith(str(source))  # ipex-llm tells Qwen and others by their path
    assert json.loads((copy / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert json.loads((copy / "tokenizer_config.json").read_text()) == {"chat_template": "{{ messages }}"}
    assert (copy / "model.safetensors").readlink() == source / "model.safetensors"
    assert before == {file.name: file.read_bytes() for file in source.iterdir()}


def test_a_hugging_face_name_is_left_as_it_is(tmp_path: Path) -> None:
    assert readable_model("Qwen/Qwen2.5-0.5B", tmp_path) == "Qwen/Qwen2.5-0.5B"
