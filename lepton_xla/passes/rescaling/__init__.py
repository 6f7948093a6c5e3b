"""Moves factors between weights and activations to reduce rounding errors: equalization, SmoothQuant, AWQ."""
