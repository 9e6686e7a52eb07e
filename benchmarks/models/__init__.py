"""Tiny models of many architectures, served in each precision and held against Transformers: docs/models.md."""
