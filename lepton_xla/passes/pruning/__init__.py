"""Pruning by masks: which elements of a weight are kept."""
