"""Pairs of videos that the user has ranked: reading, checking and encoding them."""
