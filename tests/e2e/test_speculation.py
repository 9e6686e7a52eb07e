"""Drafts by a smaller model through a real worker: the same text, counted and logged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file

from benchmarks.make_model import first_layers
from ipex_vllm.demo import MODEL_DIR
from tests.processes import worker
from tests.support import generate, openai_client

QUESTION = "What does textwrap.wrap do?"
SIZES = {384: 128, 1024: 256}  # of the demo model, and of a draft that costs a tenth of it


def small_model(folder: Path) -> Path:
    """A part of each matrix of the demo model's first layer: hardly ever right, and cheap enough to be asked."""
    first_layers(MODEL_DIR, folder, 1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: each[tuple(slice(SIZES.get(size, size)) for size in each.shape)].contiguous()
        for name, each in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def counted(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_a_quantized_model_drafts_for_another(tmp_path: Path) -> None:
    draft = small_model(tmp_path / "draft")
    flags = ("--model-path", "demo", "--low-bit", "sym_int8", "--dtype", "float32", "--no-register")
    with worker(tmp_path / "w", *flags, "--speculative", "draft", "--draft-model", str(draft)) as running:
        assert re.search(r"speculation: drafts by \S+draft, 0.0\d GiB of weights", running.output)
        asked: dict[str, Any] = {
            "model": "demo",
            "prompt": QUESTION,
            "max_new_tokens": 60,
            "temperature": 0.0,
            "echo": False,
        }
        answer = generate(running.url, **asked, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 60
        (line,) = re.findall(r"completion_tokens=60 .* drafts_accepted=(\d+)/(\d+)", running.output)
        accepted, drafted = map(int, line)
        assert 0 <= accepted <= drafted
        assert drafted > 0
        labels = 'engine="0",model_name="demo"'
        for what, of_all in (("accepted", accepted), ("draft", drafted)):
            name = f"vllm:spec_decode_num_{what}_tokens"
            total = counted(running.url, f"{name}_total{{{labels}}}")
            assert total >= of_all  # the warm-up has drafts, too
            by_position = [
                counted(running.url, f'{name}_per_pos_total{{{labels},position="{position}"}}') for position in range(5)
            ]
            assert sum(by_position) == total
            assert by_position == sorted(by_position, reverse=True)
        with openai_client(running.url) as client:
            same = client.completions.create(
                model="demo", prompt=QUESTION, max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
            )
            narrowed = client.completions.create(
                model="demo",
                prompt=QUESTION,
                max_tokens=20,
                temperature=1.5,
                extra_body={"ignore_eos": True, "min_p": 1.0},
            )
        assert same.choices[0].text == answer["text"]
        assert same.choices[0].text.startswith(narrowed.choices[0].text)
        assert len(re.findall("drafts_accepted=", running.output)) == 2, "what drafts do not know has none"
