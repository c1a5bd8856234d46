"""Experiments that anyone can rerun: arms, learning rates and seeds compared on clips never trained on."""
