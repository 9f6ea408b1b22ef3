"""Textual Inversion, DreamBooth-LoRA and Custom Diffusion, the trainings that DVAR stops (arXiv 2302.04841)."""
