"""The models of the matrix that read pictures: each is asked with text alone, and again with a picture."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.models.architecture import (
    ALTERNATING,
    BASE,
    LINEAR_ATTENTION,
    LINEAR_THEN_FULL,
    Architecture,
    Picture,
)

SIZE, PATCH = 56, 14  # of a picture and of a patch, in pixels
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
# Of Qwen's models, from the second generation on.
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
QWEN_ROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
}


def gemma3_processor(tokenizer: Any) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    return Gemma3Processor(Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_seq_length=4)


def pixtral_processor(tokenizer: Any) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": SIZE}, patch_size={"height": PATCH, "width": PATCH})
    return PixtralProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2)


def llava_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def qwen_processor(tokenizer: Any, name: str, patch: int) -> Any:
    """The processor `name`, of pictures in patches of so many pixels."""
    import transformers

    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    images = transformers.Qwen2VLImageProcessor(size=pixels, patch_size=patch)
    videos = transformers.Qwen2VLVideoProcessor() if patch == PATCH else transformers.Qwen3VLVideoProcessor()
    return getattr(transformers, name)(images, tokenizer, videos)


def qwen_picture(name: str, patch: int) -> Picture:
    return Picture(
        "<|vision_start|><|image_pad|><|vision_end|>",
        {"<|image_pad|>": 5, "<|video_pad|>": 6, "<|vision_start|>": 7, "<|vision_end|>": 8},
        partial(qwen_processor, name=name, patch=patch),
    )


# The vision tower by the names that checkpoints have: this Transformers writes shorter ones, unknown to vLLM.
TOWER = {"vision_tower.": "vision_tower.vision_model."}
GEMMA3_PICTURE = Picture(
    "<start_of_image>",
    {"<image_soft_token>": 5, "<start_of_image>": 6, "<end_of_image>": 7},
    gemma3_processor,
    {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    TOWER,
)
PIXTRAL_PICTURE = Picture("[IMG]", {"[IMG]": 5, "[IMG_BREAK]": 6, "[IMG_END]": 7}, pixtral_processor)
LLAVA_PICTURE = Picture("<image>", {"<image>": 5}, llava_processor, weights=TOWER)


def with_images(
    config: str, structure: str, picture: Picture, text: dict[str, Any], dtype: str = "float32", **settings: Any
) -> Architecture:
    return Architecture(
        config, structure, settings, {**BASE, **text}, "AutoModelForImageTextToText", picture=picture, dtype=dtype
    )


READERS: dict[str, Architecture] = {
    "gemma3": with_images(
        "Gemma3Config",
        "vision tower, QK norm, windows",
        GEMMA3_PICTURE,
        {"head_dim": 32, "sliding_window": 16, "layer_types": ALTERNATING, "query_pre_attn_scalar": 32},
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "mistral3": with_images(
        "Mistral3Config",
        "Pixtral's tower",
        PIXTRAL_PICTURE,
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 32},
        image_token_index=5,
    ),
    "llava": with_images(
        "LlavaConfig",
        "CLIP's tower",
        LLAVA_PICTURE,
        {"model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=5,
    ),
    "qwen2-vl": with_images(
        "Qwen2VLConfig",
        "rotary in three sections",
        qwen_picture("Qwen2VLProcessor", PATCH),
        QWEN_ROPE,
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
        **QWEN_TOKENS,
    ),
    "qwen2.5-vl": with_images(
        "Qwen2_5_VLConfig",
        "rotary in three sections, windows in the tower",
        qwen_picture("Qwen2_5_VLProcessor", PATCH),
        QWEN_ROPE,
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128, "num_heads": 2},
        **QWEN_TOKENS,
    ),
    "qwen3-vl": with_images(
        "Qwen3VLConfig",
        "interleaved rotary in three sections, deep stack",
        qwen_picture("Qwen3VLProcessor", 16),
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
    "qwen3.5": with_images(
        "Qwen3_5Config",
        "gated linear attention under a vision tower",
        qwen_picture("Qwen3VLProcessor", 16),
        {**LINEAR_ATTENTION, "layer_types": LINEAR_THEN_FULL, "head_dim": 64},
        dtype="bfloat16",
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
        | {"num_heads": 2, "num_position_embeddings": 16},
        **QWEN_TOKENS,
    ),
}

WITH_TEXT = {name: replace(reader, picture=None, flags=("--language-model-only",)) for name, reader in READERS.items()}
WITH_A_PICTURE = {
    f"{name}-picture": replace(reader, structure="the same, asked with a picture") for name, reader in READERS.items()
}
PICTURES: dict[str, Architecture] = {**WITH_TEXT, **WITH_A_PICTURE}
