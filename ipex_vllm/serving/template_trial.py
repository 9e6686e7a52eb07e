"""Tries a chat template, which is a stranger's program, in a process that can be ended.

Jinja's sandbox keeps a template from the machine, not from looping. This module is run as a program, with Jinja alone,
within a limit of processor time and memory. What the template writes is no matter here, nor what it refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

CPU_LIMIT_S = 3  # a template takes a millisecond, Python and Jinja a fifth of a second to start
MEMORY_LIMIT_BYTES = 1 << 30
TIMEOUT_S = 60  # for those seconds on a busy machine


def ends(template: str, special_tokens: Mapping[str, Any], dialogues: Sequence[Sequence[Mapping[str, str]]]) -> bool:
    """Whether a chat template comes to an end for each of `dialogues`."""
    task = {"template": template, "special_tokens": special_tokens, "dialogues": dialogues, "cpu_limit_s": CPU_LIMIT_S}
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(task, default=str).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            # What is preloaded for computing takes more than the limit of memory.
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_limit_s"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES,) * 2)
    for dialogue in task["dialogues"]:
        try:
            render(task["template"], messages=dialogue, add_generation_prompt=True, **task["special_tokens"])
        except MemoryError:
            sys.exit(1)
        except Exception:  # an error is an end
            continue


def render(template: str, **variables: Any) -> None:
    """As Transformers' apply_chat_template does, with the names that it gives to templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    # Transformers' own block, around what a model is trained on, changes no text.
    template = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{%\1 if true \3%}{% endif \3%}", template)
    for _ in environment.from_string(template).generate(tools=None, documents=None, **variables):
        pass


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
