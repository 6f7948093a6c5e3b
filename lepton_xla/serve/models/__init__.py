"""The models that a server answers for."""
