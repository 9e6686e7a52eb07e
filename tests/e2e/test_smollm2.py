"""`make serve` without a model: SmolLM2 from its GGUF file, as the README shows it."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import Service


@pytest.mark.runs(
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"model": "smollm2", "messages": [{"role": "user", "content": "What is gravity?"}]}\'',
)
def test_the_readmes_curl_gets_an_answer_in_plain_english(tmp_path: Path) -> None:
    with Service(tmp_path / "up", "--model-path", "smollm2") as service:
        printed = re.search(r"curl (\S+) -H '([^']+)' .*?-d '(.+?)'\n", service.output, re.DOTALL)
        assert printed is not None
        command = ["curl", "--silent", printed[1], "-H", printed[2], "-d", printed[3]]
        answer = subprocess.run(command, capture_output=True, check=True)
        content = json.loads(answer.stdout)["choices"][0]["message"]["content"]
        assert "force" in content.lower(), content
        assert "210 q4_1 as asym_int4, 61 f32 as they are, 1 q8_0 as sym_int8" in service.output
        assert service.stop() == 0
