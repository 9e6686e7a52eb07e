"""FastChat's OpenAI API server on today's pydantic: `python -m ipex_vllm.fastchat_api`, with its own flags.

FastChat 0.2.36 streams with `model.json(ensure_ascii=False)`, which pydantic 2 refuses, and vLLM needs pydantic 2. So
this gives pydantic's models that one keyword back, and then runs FastChat's own module as it is.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from pydantic import BaseModel

MODULE = "fastchat.serve.openai_api_server"


def json_as_in_pydantic_1(self: BaseModel, *, ensure_ascii: bool = False, **options: Any) -> str:
    """Pydantic 2 never escapes characters beyond ASCII, which is what FastChat asks for."""
    return self.model_dump_json(ensure_ascii=ensure_ascii, **options)


def main() -> None:
    BaseModel.json = json_as_in_pydantic_1  # type: ignore[method-assign]
    sys.argv[0] = MODULE
    runpy.run_module(MODULE, run_name="__main__")


if __name__ == "__main__":
    main()
