"""`make serve` without a model: SmolLM2 from its GGUF file, as the README shows it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.processes import Service
from tests.support import openai_client

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
# No parser is known by this model's template, which shows no tools.
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.runs(
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"model": "smollm2", "messages": [{"role": "user", "content": "What is gravity?"}]}\'',
)
def test_the_readmes_curl_gets_an_answer_in_plain_english_and_a_forced_call_is_made(tmp_path: Path) -> None:
    with Service(tmp_path / "up", "--model-path", "smollm2") as service, openai_client(service.worker_url) as client:
        printed = re.search(r"curl (\S+) -H '([^']+)' .*?-d '(.+?)'\n", service.output, re.DOTALL)
        assert printed is not None
        command = ["curl", "--silent", printed[1], "-H", printed[2], "-d", printed[3]]
        answer = subprocess.run(command, capture_output=True, check=True)
        content = json.loads(answer.stdout)["choices"][0]["message"]["content"]
        # Sampled, so that the words differ; but English about the matter.
        assert "gravity" in content.lower(), content
        assert any(word in content.lower() for word in ("force", "mass", "attract", "pull", "fall")), content
        assert "Warning" not in service.output
        assert "210 q4_1 as asym_int4, 61 f32 as they are, 1 q8_0 as sym_int8" in service.output
        asked: Any = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Is it warm in Rome?"}],
            "tools": [TOOL],
        }
        for choice in (NAMED, "required"):
            called = client.chat.completions.create(**asked, tool_choice=choice, temperature=0, max_tokens=100)
            (call,) = called.choices[0].message.tool_calls or []
            assert call.function.name == "weather"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        for automatic in ({}, {"tool_choice": "auto"}):
            with pytest.raises(openai.BadRequestError, match="shows it no tools"):
                client.chat.completions.create(**asked, **automatic)
        assert service.stop() == 0
