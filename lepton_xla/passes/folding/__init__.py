"""Batch norms and scales that go into the weights beside them."""
