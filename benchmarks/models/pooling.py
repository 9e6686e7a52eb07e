"""The models of the matrix that give vectors and scores."""

from __future__ import annotations

from typing import Any

from benchmarks.models.architecture import BASE, VOCAB_SIZE, Architecture, Task

POOLING_FLAGS = ("--runner", "pooling")
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[Task, str] = {"embed": "AutoModel", "score": "AutoModelForSequenceClassification"}


def pooled(config: str, structure: str, task: Task, settings: dict[str, Any]) -> Architecture:
    one_score = {"num_labels": 1} if task == "score" else {}
    return Architecture(
        config, structure, {**settings, **one_score}, model=MODELS[task], task=task, flags=POOLING_FLAGS
    )


# As checkpoints have it; positions begin behind the padding's id.
ROBERTA = {**ENCODER, "pad_token_id": 3, "type_vocab_size": 1, "position_embedding_type": "absolute"}
MODERN_BERT = {**ENCODER, "local_attention": 16, "global_attn_every_n_layers": 2}

POOLING: dict[str, Architecture] = {
    "bert-embed": pooled("BertConfig", "encoder, the first token's vector", "embed", ENCODER),
    "xlm-roberta-embed": pooled("XLMRobertaConfig", "encoder, positions from the padding on", "embed", ROBERTA),
    "modernbert-embed": pooled("ModernBertConfig", "encoder, rotary, windows to both sides", "embed", MODERN_BERT),
    "qwen3-embed": pooled("Qwen3Config", "decoder, the last token's vector", "embed", {**BASE, "head_dim": 64}),
    "bert-score": pooled("BertConfig", "cross-encoder, kinds of tokens", "score", ENCODER),
    "xlm-roberta-score": pooled("XLMRobertaConfig", "cross-encoder, a head of two layers", "score", ROBERTA),
    "modernbert-score": pooled("ModernBertConfig", "cross-encoder, rotary, windows", "score", MODERN_BERT),
    "qwen3-score": pooled("Qwen3Config", "decoder, the last token's score", "score", {**BASE, "head_dim": 64}),
}
