"""Pictures beside a prompt's text, as vLLM's multimodal models take them."""

from __future__ import annotations

import asyncio
from typing import Any

from ipex_vllm.engines.generation import IMAGE, InvalidParameter


def reads_images(llm: Any) -> bool:
    """Whether the loaded model takes pictures, by its own processor and --limit-mm-per-prompt."""
    processor = llm.renderer.mm_processor
    return processor is not None and processor.info.allowed_mm_limits.get("image", 0) != 0


def with_placeholders(llm: Any, prompt: str, num_images: int) -> str:
    """The prompt with the model's own mark in each picture's place. Raises InvalidParameter."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    first, *others = prompt.split(IMAGE)
    if len(others) != num_images:
        raise InvalidParameter(f"The prompt has {len(others)} marks {IMAGE} for {num_images} images.")
    model = get_model_cls(llm.model_config)
    return first + "".join(
        (model.get_placeholder_str("image", number) or "") + text for number, text in enumerate(others, 1)
    )


async def with_images(llm: Any, token_ids: list[int], images: tuple[bytes, ...]) -> Any:
    """vLLM's input of a prompt with a mark for each picture, and a token for each of its places.

    Raises InvalidParameter.
    """
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    wishes = llm.model_config.multimodal_config.media_io_kwargs or {}
    media = ImageMediaIO(**wishes.get("image", {}))
    pictures = [await asyncio.to_thread(decode, media, number, image) for number, image in enumerate(images)]
    prompt = {"prompt_token_ids": token_ids, "multi_modal_data": {"image": pictures}}
    (rendered,) = await llm.renderer.render_cmpl_async([parse_model_prompt(llm.model_config, prompt)])
    return rendered


def decode(media: Any, number: int, image: bytes) -> Any:
    """As vLLM decodes what comes over /v1: turned the way that the file says, white where it is transparent."""
    from PIL import Image

    try:
        return media.load_bytes(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidParameter(f"images[{number}] cannot be read as a picture: {error}.") from error
