"""Runs a file of rows through an artifact, in several processes or on a Ray cluster."""
