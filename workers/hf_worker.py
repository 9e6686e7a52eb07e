"""The worker on plain Transformers: `python -m workers.hf_worker --model-path X --device cpu --low-bit sym_int8`.

The same server, flags and errors as `python -m ipex_vllm.worker`; one request at a time. The engine is in hf_engine.py.
"""

from __future__ import annotations

from ipex_vllm import worker
from ipex_vllm.engines.engine import Engine


def main() -> None:
    """Run the worker and exit the process."""
    worker.main(load=load_engine)


def load_engine() -> type[Engine]:
    from workers.hf_engine import HfEngine

    return HfEngine


if __name__ == "__main__":
    main()
