"""The worker on plain Transformers: `python -m workers.hf_worker --model-path X --device cpu --low-bit sym_int8`.

The same server, flags and errors as `python -m ipex_vllm.worker`; one request at a time. The engine is in hf_engine.py.
"""

from ipex_vllm import worker


def main() -> None:
    """Run the worker and exit the process."""
    worker.main(engine="workers.hf_engine:HfEngine")


if __name__ == "__main__":
    main()
