"""The layers that compute with quantized weights: a file a library that multiplies."""
