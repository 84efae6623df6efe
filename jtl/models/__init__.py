"""Backbones of the model families in stages, heads, and the models that they make."""
