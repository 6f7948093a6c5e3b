"""Weights and activations in fewer bits: rounding, calibrated and trained, and real integer products."""
