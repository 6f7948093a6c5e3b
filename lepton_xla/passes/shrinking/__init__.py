"""Structured pruning: physical removal of channels, heads and hidden units."""
