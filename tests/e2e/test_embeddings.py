"""Models that give embeddings, in low bits too, by FastChat's endpoint, its API server and the worker's /v1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from benchmarks.make_model import train_tokenizer, training_text
from tests.processes import fastchat_api, fastchat_controller, worker
from tests.support import generate, openai_client

TEXTS = ["import itertools", "def spam(eggs): return eggs + 1", "the quick brown fox"]
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_bert(folder: Path) -> Path:
    """An encoder as E5 and BGE are: BERT, with the mean over its tokens, as sentence-transformers stores it."""
    tokenizer = train_tokenizer(2048, training_text(500_000))
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPE, vocab_size=2048, max_position_embeddings=256, pad_token_id=0))
    save(model, tokenizer, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (path, kind) in enumerate(modules)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SHAPE["hidden_size"], "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def make_qwen3(folder: Path) -> Path:
    """A decoder as Qwen3-Embedding is: the last token's hidden state."""
    tokenizer = train_tokenizer(2048, training_text(500_000))
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPE,
        vocab_size=2048,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    return save(Qwen3Model(config), tokenizer, folder)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.model_max_length = 256
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reference(folder: Path, pooling: str) -> torch.Tensor:
    """Transformers' embeddings of TEXTS in float32, each of norm 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            rows.append(hidden.mean(0) if pooling == "mean" else hidden[-1])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def closeness(given: list[list[float]], wanted: torch.Tensor) -> float:
    """The least cosine of a vector with its reference; the given ones must have norm 1."""
    vectors = torch.tensor(given)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(given)), atol=1e-3)
    return float((vectors * wanted).sum(-1).min())


def test_an_encoder_in_low_bits_answers_every_client(tmp_path: Path) -> None:
    model = make_bert(tmp_path / "bert")
    wanted = reference(model, "mean")
    with fastchat_controller(tmp_path / "controller") as controller:
        arguments = ("--model-path", str(model), "--runner", "pooling", "--low-bit", "sym_int8")
        address = ("--controller-address", controller.url)
        with (
            worker(tmp_path / "worker", *arguments, *address) as running,
            fastchat_api(tmp_path / "api", controller.url) as api,
        ):
            body = {"model": "bert", "input": TEXTS}
            own = httpx.post(f"{running.url}/worker_get_embeddings", json=body, trust_env=False).json()
            assert closeness(own["embedding"], wanted) > 0.999
            for url in (api.url, running.url):
                with openai_client(url) as client:
                    answer = client.embeddings.create(model="bert", input=TEXTS)
                assert closeness([item.embedding for item in answer.data], wanted) > 0.999
                assert answer.usage.prompt_tokens == own["token_num"]
            score = {"model": "bert", "text_1": TEXTS[0], "text_2": TEXTS[1:]}
            scores = httpx.post(f"{running.url}/score", json=score, trust_env=False).json()["data"]
            cosines = (wanted[:1] * wanted[1:]).sum(-1)
            assert [item["score"] for item in scores] == pytest.approx(cosines.tolist(), abs=0.01)
            rerank = {"model": "bert", "query": TEXTS[0], "documents": TEXTS[1:]}
            ranked = httpx.post(f"{running.url}/rerank", json=rerank, trust_env=False).json()["results"]
            assert ranked[0]["index"] == int(cosines.argmax())
            told = generate(running.url, prompt="import")
            assert (told["error_code"], "embeddings and scores" in told["text"]) == (40302, True)
            long = {"input": ["word " * 1000]}
            refused = httpx.post(f"{running.url}/worker_get_embeddings", json=long, trust_env=False).json()
            assert (refused["error_code"], "the model reads 256" in refused["text"]) == (40302, True)
            assert "ipex_vllm_slots_in_use 0.0" in httpx.get(f"{running.url}/metrics", trust_env=False).text


def test_a_decoder_gives_embeddings_as_transformers_does(tmp_path: Path) -> None:
    model = make_qwen3(tmp_path / "qwen3")
    arguments = ("--model-path", str(model), "--runner", "pooling", "--no-register", "--low-bit", "fp32")
    with worker(tmp_path / "worker", *arguments) as running, openai_client(running.url) as client:
        answer = client.embeddings.create(model="qwen3", input=TEXTS)
        assert closeness([item.embedding for item in answer.data], reference(model, "last")) > 0.9999
