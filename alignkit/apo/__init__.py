"""Diffusion-APO (arXiv 2605.07503, our reading): training at the states that a sampler visits. docs/apo.md says how."""
