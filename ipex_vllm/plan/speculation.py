"""What drafts tokens for the model, if anything does."""

from __future__ import annotations

from dataclasses import replace

from ipex_vllm.errors import OptionError
from ipex_vllm.machine.facts import GIB
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import Speculative, WorkerOptions
from ipex_vllm.plan.plan import Demands, Plan, weight_bytes

KEPT_STATE = "the state of its recurrent layers cannot be taken back when a draft is refused"


def with_speculation(plan: Plan, options: WorkerOptions, model: ModelFacts, demands: Demands) -> Plan:
    """`plan` with what drafts, and a line that says why. Raises OptionError where the model or the engine cannot."""
    chosen, reason = choose(options, model, demands)
    if chosen == "off" and options.speculative == "off":
        return plan
    line = f"speculation: {reason}"
    if chosen != "draft" or model.draft is None:
        return replace(plan, speculative=chosen, lines=(*plan.lines, line))
    # The plan has the format that was chosen for this machine.
    formats = replace(options, low_bit=plan.low_bit)
    drafts = weight_bytes(model.draft, formats)
    own = weight_bytes(replace(model, draft=None), formats)
    cost = drafts / own if drafts and own else 0.25
    size = "" if drafts is None else f", {drafts / GIB:.2f} GiB of weights that the memory above counts"
    return replace(
        plan,
        speculative=chosen,
        draft_model=options.draft_model,
        draft_cost=cost,
        lines=(*plan.lines, f"{line} {options.draft_model}{size}"),
    )


def choose(options: WorkerOptions, model: ModelFacts, demands: Demands) -> tuple[Speculative, str]:
    """What drafts, and the reason. Raises OptionError."""
    wanted = options.speculative
    if options.draft_model is not None and wanted not in ("draft", "auto"):
        raise OptionError(f"--draft-model goes with --speculative draft or auto, not with {wanted}")
    if options.draft_model is None and wanted == "draft":
        raise OptionError("--speculative draft needs --draft-model: a smaller model with the same tokenizer")
    if wanted == "off":
        return "off", "off"
    refusal = demands.no_speculation
    if refusal is None and model.kv_cache is not None and model.kv_cache.state_bytes:
        refusal = KEPT_STATE
    if refusal is not None:
        if wanted != "auto":
            raise OptionError(f"--speculative {wanted} does not run here: {refusal}")
        return "off", f"off ({refusal})"
    if options.draft_model is not None:
        return "draft", "drafts by"
    how = "chosen with --speculative" if wanted == "ngram" else "no --draft-model is given"
    return "ngram", f"drafts looked up in the text so far ({how}), as long as they pay"
