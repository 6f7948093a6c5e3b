"""Folds batch norms and scales into the preceding weights."""
