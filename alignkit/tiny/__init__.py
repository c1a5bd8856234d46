"""Tiny models that the project trained itself: their clips, their training, their weights.

`alignkit.models.shipped_model(family)` is the diffusers folder of each.
"""
