"""These tests need Intel's extension: `make test-ipex` runs them with its environment's Python, others pass by."""

import importlib.util

if importlib.util.find_spec("intel_extension_for_pytorch") is None:
    collect_ignore_glob = ["test_*.py"]
