"""FastChat's Gradio web server, unmodified, with each model's own conversation. Runs in the web UI's environment.

The server takes one function from FastChat's model code: `get_conversation_template(name)`. FastChat's own looks the
name up in a registry, answers `one_shot` for every model that is not in it, and its module imports PyTorch,
Transformers and Accelerate. Here another module stands in its place and asks the worker that serves the model.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import signal
import sys
import tempfile
import types
from typing import Any

import httpx

TIMEOUT_S = 30.0


def main() -> None:
    """Run the web server with the options in sys.argv, which are its own, until a signal ends it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--controller-url", required=True)
    controller_url = parser.parse_known_args()[0].controller_url

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="ipex-vllm-webui-") as scratch:
        if not os.environ.get("LOGDIR"):
            # FastChat writes every chat into files there and its log holds them too: kept only where asked for.
            os.environ["LOGDIR"] = scratch
            logging.getLogger("gradio_web_server").addFilter(lambda record: record.levelno > logging.INFO)
        replace_name_lookups(controller_url)
        list_all_models()
        runpy.run_module("fastchat.serve.gradio_web_server", run_name="__main__", alter_sys=True)


def replace_name_lookups(controller_url: str) -> None:
    """Put what FastChat decides by a model's name into our hands. Call before the web server is imported."""
    import fastchat.utils

    adapter = types.ModuleType("fastchat.model.model_adapter")
    vars(adapter).update(
        get_conversation_template=lambda name: worker_conversation(controller_url, name),
        # What fastchat/model/__init__.py imports beside it, and the web server does not use.
        load_model=None,
        add_model_args=None,
    )
    sys.modules[adapter.__name__] = adapter
    # FastChat's sends what is typed to OpenAI when the model's name contains "gpt-4", "claude" or "bard".
    fastchat.utils.moderation_filter = lambda text, names: False


def list_all_models() -> None:
    """Show the models that read pictures, too: the page has no place for one, and they answer texts as any other.

    FastChat's asks the controller for the workers that did not register as multimodal.
    """
    import requests

    post: Any = requests.post

    def post_to_all(url: str, *arguments: Any, **options: Any) -> Any:
        return post(url.replace("/list_language_models", "/list_models"), *arguments, **options)

    requests.post = post_to_all  # type: ignore[assignment]


def worker_conversation(controller_url: str, model_name: str) -> object:
    """Return a new conversation in the form that the model's worker answers at /worker_get_conv_template.

    Raises gradio.Error, whose message the page shows.
    """
    import gradio  # type: ignore[import-not-found]  # in the web UI's environment only
    from fastchat.conversation import Conversation, SeparatorStyle

    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
            found = client.post(f"{controller_url}/get_worker_address", json={"model": model_name})
            address = found.raise_for_status().json()["address"]
            if not address:
                raise gradio.Error(f"No worker serves {model_name!r}. Start one, then reload this page.")
            answer = client.post(f"{address}/worker_get_conv_template", json={"model": model_name})
            fields = answer.raise_for_status().json()["conv"]
    except httpx.HTTPError as error:
        raise gradio.Error(f"The worker of {model_name!r} does not answer: {error}. Try again later.") from error
    return Conversation(**{**fields, "sep_style": SeparatorStyle(fields["sep_style"])})


if __name__ == "__main__":
    main()
