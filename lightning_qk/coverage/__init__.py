"""Measure which of transformers' models are read and captured: ``lightning-qk coverage``."""
