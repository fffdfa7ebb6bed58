"""Differentiable penalties on attention."""
