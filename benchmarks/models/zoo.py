"""The architectures of the matrix: a small configuration of each, with the structure that is its own.

Sizes are about the least that vLLM's kernels and the low-bit formats take: 128 inputs, heads of 32 or 64.
A window is shorter than the text that is compared, so that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # with the rotary part the one size that vLLM takes
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Pictures:
    """How a model reads a picture.

    Attributes:
        processor, image_processor: names of Transformers' classes.
        settings: of the image processor, and `of_processor` of the processor.
        placeholder: what a prompt has in a picture's place.
        tokens: the ids that its special tokens have.
        names: those by which the processor asks the tokenizer for them.
    """

    processor: str
    image_processor: str
    settings: dict[str, Any]
    placeholder: str
    tokens: dict[str, int]
    names: dict[str, str] = field(default_factory=dict)
    of_processor: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        config: the name of Transformers' configuration class.
        structure: what sets it apart, in the table's words.
        settings: the configuration's fields beside or in place of `BASE`'s.
        text: those of the language model inside a model that takes images, in place of `BASE`'s; None for text alone.
        model: Transformers' class that answers for it.
        dtype: what it is served in where nothing quantizes.
        reference: the fields in which Transformers has to differ from what the model's file says, to compute what its
            makers do.
        known: of each format, "float" among them, that is known not to hold, why.
        engine: vLLM's engine arguments that it needs.
        pictures: how it reads them; None where it is asked with text alone.
    """

    config: str
    structure: str
    settings: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    model: str = "AutoModelForCausalLM"
    dtype: str = "float32"
    reference: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    pictures: Pictures | None = None


def text_only(config: str, structure: str, reference: Any = (), known: Any = (), **settings: Any) -> Architecture:
    return Architecture(config, structure, {**BASE, **settings}, reference=dict(reference), known=dict(known))


def latent(config: str, structure: str, known: Any = (), **settings: Any) -> Architecture:
    # On CPUs with AMX vLLM would take an implementation that computes in 16 bits alone, also in float32.
    engine = {"attention_backend": "CPU_MLA"}
    return Architecture(config, structure, {**BASE, **MLA, **settings}, known=dict(known), engine=engine)


def with_images(
    config: str, structure: str, text: dict[str, Any], pictures: Pictures | None = None, **settings: Any
) -> Architecture:
    return Architecture(config, structure, settings, {**BASE, **text}, "AutoModelForImageTextToText", pictures=pictures)


ALL_FORMATS = ("float", "sym_int8", "sym_int4")
NO_OPERATOR = "vLLM has the operator for GPUs alone"
# Of Qwen's models that take images, from the second generation on.
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
QWEN_PICTURES: dict[str, Any] = {
    "image_processor": "Qwen2VLImageProcessor",
    "settings": {"size": {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}},  # pixels
    "placeholder": "<|vision_start|><|image_pad|><|vision_end|>",
    "tokens": {"<|image_pad|>": 5, "<|video_pad|>": 6, "<|vision_start|>": 7, "<|vision_end|>": 8},
}
QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}

ALTERNATING = ["sliding_attention", "full_attention"]
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]

ARCHITECTURES: dict[str, Architecture] = {
    # Dense decoders.
    "llama": text_only("LlamaConfig", "GQA, rotary"),
    "llama3": text_only(
        "LlamaConfig",
        "rope scaling of Llama 3, tied head",
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": text_only("MistralConfig", "sliding window in all layers", sliding_window=16, head_dim=32),
    "qwen2": text_only("Qwen2Config", "biases of q, k, v"),
    "qwen3": text_only("Qwen3Config", "QK norm", head_dim=64),
    "gemma": text_only("GemmaConfig", "norms plus one, scaled embedding", head_dim=64, tie_word_embeddings=True),
    "gemma2": text_only(
        "Gemma2Config",
        "soft caps, windows, four norms",
        head_dim=32,
        sliding_window=16,
        layer_types=ALTERNATING,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    ),
    "gemma3-text": text_only(
        "Gemma3TextConfig",
        "QK norm, windows with a rotary base of their own",
        head_dim=32,
        sliding_window=16,
        layer_types=ALTERNATING,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    ),
    "phi3": text_only("Phi3Config", "fused projections", sliding_window=None),
    "glm": text_only("GlmConfig", "partial rotary, interleaved", head_dim=32, partial_rotary_factor=0.5),
    "glm4": text_only("Glm4Config", "partial rotary, four norms", head_dim=32, partial_rotary_factor=0.5),
    "olmo": text_only("OlmoConfig", "norms without weights"),
    "olmo2": text_only("Olmo2Config", "norms after, QK norm"),
    "olmo3": text_only("Olmo3Config", "norms after, windows", sliding_window=16, layer_types=ALTERNATING),
    "cohere": text_only("CohereConfig", "parallel residual, logit scale", tie_word_embeddings=True),
    "cohere2": text_only(
        "Cohere2Config",
        "parallel residual, windows, layers without rotary",
        # Cohere's window is of the tokens before a token.
        reference={"sliding_window": 17},
        sliding_window=16,
        layer_types=ALTERNATING,
        tie_word_embeddings=True,
    ),
    "granite": text_only(
        "GraniteConfig",
        "multipliers",
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "smollm3": text_only("SmolLM3Config", "layers without rotary", no_rope_layers=[1, 0]),
    "starcoder2": text_only("Starcoder2Config", "layer norms, biases", sliding_window=None),
    "stablelm": text_only("StableLmConfig", "partial rotary, layer norms", partial_rotary_factor=0.25),
    "persimmon": text_only(
        "PersimmonConfig",
        "squared ReLU, QK norm",
        known=dict.fromkeys(ALL_FORMATS, "by vLLM's Transformers backend; not traced"),
        partial_rotary_factor=0.5,
    ),
    "nemotron": text_only("NemotronConfig", "squared ReLU, norms plus one", partial_rotary_factor=0.5, head_dim=32),
    "exaone4": text_only(
        "Exaone4Config", "norms after, windows", sliding_window=16, layer_types=ALTERNATING, head_dim=32
    ),
    "ernie4.5": text_only("Ernie4_5Config", "interleaved rotary", head_dim=32),
    "seed-oss": text_only("SeedOssConfig", "biases", head_dim=32),
    "hunyuan": text_only("HunYuanDenseV1Config", "QK norm after rotary", head_dim=32),
    "arcee": text_only("ArceeConfig", "squared ReLU"),
    "apertus": text_only(
        "ApertusConfig",
        "xIELU, QK norm",
        known={"float": "vLLM makes the two numbers of xIELU in bf16, which may be why"},
    ),
    "gpt2": Architecture(
        "GPT2Config",
        "learned positions, fused transposed projections",
        {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-neox": text_only("GPTNeoXConfig", "parallel residual, partial rotary", num_key_value_heads=4),
    "gptj": Architecture(
        "GPTJConfig",
        "parallel residual, interleaved rotary",
        {"vocab_size": VOCAB_SIZE, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 16}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": Architecture(
        "OPTConfig",
        "learned positions, ReLU",
        {**BASE, "ffn_dim": 256, "word_embed_proj_dim": 128},
    ),
    "bloom": Architecture(
        "BloomConfig",
        "ALiBi, norm of the embedding",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": text_only("FalconConfig", "parallel residual, MQA", new_decoder_architecture=False, multi_query=True),
    "falcon-40b": text_only(
        "FalconConfig", "two norms, grouped heads", new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "falcon-alibi": text_only(
        "FalconConfig",
        "ALiBi, sequential",
        known=dict.fromkeys(ALL_FORMATS, "ALiBi beside biases; either alone is equal, the cause is not found"),
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
        bias=True,
    ),
    # Mixtures of experts.
    "mixtral": text_only("MixtralConfig", "experts", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2-moe": text_only(
        "Qwen2MoeConfig",
        "experts and a gated shared one",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        decoder_sparse_step=1,
    ),
    "qwen3-moe": text_only(
        "Qwen3MoeConfig",
        "experts, QK norm",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        head_dim=32,
    ),
    "olmoe": text_only("OlmoeConfig", "experts, QK norm", num_experts=4, num_experts_per_tok=2),
    "granite-moe": text_only("GraniteMoeConfig", "experts, multipliers", num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": text_only(
        "GptOssConfig",
        "experts with biases, sinks, windows",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=ALTERNATING,
        head_dim=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
    "ernie4.5-moe": text_only(
        "Ernie4_5_MoeConfig",
        "experts with a correction bias, shared ones",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        head_dim=32,
    ),
    "minimax-m2": text_only(
        "MiniMaxM2Config",
        "sigmoid router with a correction bias, partial rotary",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=32,
        rotary_dim=16,
        scoring_func="sigmoid",
        use_routing_bias=True,
    ),
    "glm4-moe": text_only(
        "Glm4MoeConfig",
        "sigmoid router in groups, shared experts",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=32,
        partial_rotary_factor=0.5,
    ),
    "dots1": text_only(
        "Dots1Config",
        "sigmoid router, QK norm",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=32,
    ),
    # Latent attention.
    "deepseek-v2": latent(
        "DeepseekV2Config",
        "MLA, shared experts",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        head_dim=64,
    ),
    "deepseek-v3": latent(
        "DeepseekV3Config",
        "MLA with yarn, grouped sigmoid router",
        known={"sym_int8": "one token differs by 1.0, as where other experts are chosen; not traced"},
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "glm4.7-flash": latent(
        "Glm4MoeLiteConfig",
        "MLA without yarn",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense", "sparse"],
        first_k_dense_replace=1,
        topk_method="noaux_tc",
    ),
    "minicpm3": text_only("MiniCPM3Config", "MLA computed as plain attention", **MLA),
    # State spaces, convolutions and linear attention.
    "mamba2": Architecture(
        "Mamba2Config",
        "state space alone",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 32, "num_heads": 8}
        | {"head_dim": 32, "n_groups": 1, "chunk_size": 16, "expand": 2, "bos_token_id": 1, "eos_token_id": 2}
        | {"pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "mamba": Architecture(
        "MambaConfig",
        "state space of the first kind",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        known=dict.fromkeys(ALL_FORMATS, NO_OPERATOR),
    ),
    "falcon-h1": text_only(
        "FalconH1Config",
        "state space beside attention",
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        head_dim=32,
    ),
    "granite4": text_only(
        "GraniteMoeHybridConfig",
        "state space, attention and experts",
        known={"sym_int8": "by 0.0006; not traced"},
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
        position_embedding_type="rope",
    ),
    "nemotron-h": text_only(
        "NemotronHConfig",
        "state space, attention, squared ReLU",
        num_hidden_layers=4,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=16,
        head_dim=32,
        # Transformers alone keeps a state from moving by less than this; NVIDIA's own code and vLLM do not.
        reference={"time_step_min": 0.0},
    ),
    "jamba": text_only(
        "JambaConfig",
        "state space of the first kind, experts",
        known=dict.fromkeys(ALL_FORMATS, NO_OPERATOR),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=16,
        use_mamba_kernels=False,
    ),
    "lfm2": text_only(
        "Lfm2Config",
        "short convolutions, QK norm",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        block_ff_dim=256,
        block_dim=128,
        conv_dim=128,
        conv_dim_out=128,
        tie_word_embeddings=True,
    ),
    "lfm2-moe": text_only(
        "Lfm2MoeConfig",
        "short convolutions, sigmoid router",
        layer_types=["conv", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        num_dense_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        "gated linear attention, gated attention, experts",
        {**BASE, **LINEAR_ATTENTION, "layer_types": LINEAR_THEN_FULL, "head_dim": 64}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
        | {"shared_expert_intermediate_size": 64, "norm_topk_prob": True},
        dtype="bfloat16",
    ),
    "qwen3.5-text": Architecture(
        "Qwen3_5TextConfig",
        "gated linear attention, gated attention",
        {**BASE, **LINEAR_ATTENTION, "layer_types": LINEAR_THEN_FULL, "head_dim": 64},
        dtype="bfloat16",
    ),
    # Models that take images, asked with text.
    "gemma3": with_images(
        "Gemma3Config",
        "vision tower, QK norm, windows",
        {"head_dim": 32, "sliding_window": 16, "layer_types": ALTERNATING, "query_pre_attn_scalar": 32},
        Pictures(
            "Gemma3Processor",
            "Gemma3ImageProcessor",
            {"size": {"height": 56, "width": 56}},
            "<start_of_image>",
            # Lines between texts and pictures are tokens, too.
            {"<image_soft_token>": 5, "<start_of_image>": 6, "<end_of_image>": 7}
            | {"\n": 8, "\n\n": 9, "\n\n\n": 10, "\n\n\n\n": 11},
            {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
            {"image_seq_length": 4},
        ),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "mistral3": with_images(
        "Mistral3Config",
        "Pixtral's tower",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 32},
        image_token_index=5,
    ),
    "llava": with_images(
        "LlavaConfig",
        "CLIP's tower",
        {"model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=5,
    ),
    "qwen2-vl": with_images(
        "Qwen2VLConfig",
        "rotary in three sections",
        QWEN_ROPE,
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
        **QWEN_TOKENS,
    ),
    "qwen2.5-vl": with_images(
        "Qwen2_5_VLConfig",
        "rotary in three sections, windows in the tower",
        QWEN_ROPE,
        Pictures("Qwen2_5_VLProcessor", **QWEN_PICTURES),
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128, "num_heads": 2}
        | {"fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    ),
    "qwen3-vl": with_images(
        "Qwen3VLConfig",
        "interleaved rotary in three sections, deep stack",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128, "num_heads": 2}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    ),
    "qwen3.5": Architecture(
        "Qwen3_5Config",
        "gated linear attention under a vision tower",
        {
            "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
            | {"num_heads": 2, "num_position_embeddings": 16},
            **QWEN_TOKENS,
        },
        {**BASE, **LINEAR_ATTENTION, "layer_types": LINEAR_THEN_FULL, "head_dim": 64},
        "AutoModelForImageTextToText",
        "bfloat16",
    ),
}
