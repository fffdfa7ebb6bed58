"""Attention calls of a running model: query, key, mask and scale as the attention function gets them."""
