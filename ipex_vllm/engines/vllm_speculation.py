"""--speculative and --draft-model in vLLM's words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit import is_plain, vllm_arguments
from ipex_vllm.machine.kv_cache import number, text_part
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import Plan

# The longest drafts; how much of them pays is decided for each stream and step (`draft_length.py`).
LOOKED_UP_TOKENS = 15
DRAFTED_TOKENS = 5


def no_speculation(args: argparse.Namespace) -> str | None:
    """Why vLLM with these arguments does not check drafts; None where it does."""
    if args.runner == "pooling":
        return "a model of embeddings or scores writes no text"
    if args.pipeline_parallel_size > 1:
        return "vLLM does not draft over a pipeline"
    return None


def check_speculation(options: WorkerOptions, args: argparse.Namespace) -> None:
    """Raise OptionError for what does not go together."""
    if options.speculative != "off" and args.speculative_config is not None:
        raise OptionError("--speculative and vLLM's own --speculative-config: give one of them")
    if options.draft_model is not None:
        check_vocabulary(Path(options.model_path), Path(options.draft_model))


def check_vocabulary(model: Path, draft: Path) -> None:
    """Raise OptionError where two directories have other tokens: a draft in others would never be right."""
    sizes = [vocabulary_size(folder) for folder in (model, draft)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise OptionError(
            f"--draft-model {draft}: it has {sizes[1]} tokens and the model {sizes[0]}; take one of its family"
        )
    tokens = [vocabulary(folder) for folder in (model, draft)]
    if None not in tokens and tokens[0] != tokens[1]:
        raise OptionError(f"--draft-model {draft}: its tokenizer is another than the model's; take one of its family")


def vocabulary_size(folder: Path) -> int | None:
    config = read_object(folder / "config.json")
    return None if config is None else number(text_part(config), "vocab_size")


def vocabulary(folder: Path) -> Any:
    """The tokens of a directory with a fast tokenizer's file, and their numbers; None without one."""
    tokenizer = read_object(folder / "tokenizer.json")
    return None if tokenizer is None else (tokenizer.get("model") or {}).get("vocab")


def read_object(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def apply_speculation(args: argparse.Namespace, plan: Plan) -> None:
    """Turn what drafts into vLLM's own arguments. Raises OptionError."""
    if args.speculative_config is None and plan.speculative == "off":
        return
    if args.per_request_spec_decode_metrics == "none":
        args.per_request_spec_decode_metrics = "summary"  # for the request's log line
    if plan.speculative == "ngram":
        # Our scheduler looks them up (`vllm_drafts.py`); vLLM's worker has only to check them.
        from ipex_vllm.low_bit.vllm.speculation import NoDrafts

        args.speculative_config = {
            "method": "custom_class",
            "model": f"{NoDrafts.__module__}.{NoDrafts.__qualname__}",
            "num_speculative_tokens": LOOKED_UP_TOKENS,
        }
    elif plan.speculative == "draft":
        assert plan.draft_model is not None
        args.speculative_config = {
            "method": "draft_model",
            "model": plan.draft_model,
            "num_speculative_tokens": DRAFTED_TOKENS,
            "draft_tensor_parallel_size": args.tensor_parallel_size,
            **weights(plan, plan.draft_model),
        }
        # A step that is scheduled ahead cannot have drafts as long as the last ones were right.
        args.async_scheduling = False


def weights(plan: Plan, draft: str) -> dict[str, Any]:
    """The format of the draft's weights: the model's, unless the draft is quantized already. Raises OptionError."""
    wishes = (plan.low_bit_head, plan.low_bit_outer) if is_plain(draft) else ()
    try:
        chosen = vllm_arguments(plan.low_bit if is_plain(draft) else None, draft, plan.device, *wishes)
    except ValueError as error:
        raise OptionError(f"--draft-model: {error}") from error
    loading = {"draft_load_config": {"load_format": chosen.get("load_format", "auto")}}
    return {"quantization": chosen.get("quantization"), **loading}
