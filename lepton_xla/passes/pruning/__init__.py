"""Masks: which elements of a weight stay."""
