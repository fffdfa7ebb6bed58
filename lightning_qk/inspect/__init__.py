"""Reads checkpoints: the query and key weights alone, layer by layer, without a model that holds weights."""
