"""The demo model that ships in this package."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"


def resolve_model_path(name: str) -> str:
    """Return the demo model's directory for "demo", and any other name unchanged."""
    return str(MODEL_DIR) if name == "demo" else name
