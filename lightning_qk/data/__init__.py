"""Text to batches: sources, tokenizers, packing, and the data module."""
