"""Preference alignment of text-to-video diffusion transformers."""

__version__ = "0.1.0"
