"""Measure which of transformers' models are read and captured: ``python -m tools.coverage``, ``make coverage``."""
