"""Held-out evaluation: pairs, samples, and whether the alignment can be called reached."""
