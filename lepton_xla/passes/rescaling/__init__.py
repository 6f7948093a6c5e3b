"""Factors moved between weights and activations so that both round better: equalization, SmoothQuant, AWQ."""
