"""These tests need ipex-llm: `make test-ipex-llm` runs them with the Python of its environment, all others pass by."""

import importlib.util

if importlib.util.find_spec("ipex_llm") is None:
    collect_ignore_glob = ["test_*.py"]
