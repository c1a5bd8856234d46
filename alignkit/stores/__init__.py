"""Stores of pairs: blocks that are made once and appear whole, how they are built, shared and read."""
