"""Whatever a client sends, it gets an answer in the protocol's form. By hand and for longer: tests/fuzz.py."""

from __future__ import annotations

from pathlib import Path

import httpx
from fastchat.conversation import get_conv_template

from ipex_vllm.serving.conversation import ChatFormat, as_json
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.slots import Slots
from tests.fuzz import API_PATHS, TIMEOUT_S, WORKER_PATHS, fuzz
from tests.processes import fastchat_stack
from tests.support import FakeEngine

NUM_BODIES = 400  # for each server


def test_every_body_is_answered_in_the_protocols_form(tmp_path: Path) -> None:
    engine = FakeEngine(context_length=2048)
    core = Core(engine, ("fake-model",), Slots(100, 100))
    server = FastChatServer(core, ChatFormat(as_json(get_conv_template("zephyr"))))
    with fastchat_stack(tmp_path, server) as stack:
        for url, paths in ((stack.worker, WORKER_PATHS), (stack.openai_server, API_PATHS)):
            with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
                outcomes = fuzz(client, paths, "fake-model", NUM_BODIES)
                assert {outcome.split()[0] for outcome in outcomes} == set(paths)
        assert "Traceback" not in stack.api.output
    assert engine.num_running == server.core.slots.queue_length == 0
    assert engine.seen, "some of them are requests"
    assert 50001 not in server.core.tally.errors
