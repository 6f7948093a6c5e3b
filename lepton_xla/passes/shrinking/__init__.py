"""Channels, heads and units that are removed, so that arrays get smaller."""
