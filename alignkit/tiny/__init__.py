"""A tiny Wan2.1 that the project trained itself: its clips, its training, its weights."""

from pathlib import Path

WAN_FOLDER = Path(__file__).parent / "wan"
"""The diffusers folder with the shipped weights, for ``WanPipeline.from_pretrained(WAN_FOLDER)``."""
