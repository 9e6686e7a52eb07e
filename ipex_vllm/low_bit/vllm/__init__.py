"""vLLM's view of the low-bit formats: a file for each of its hooks."""
