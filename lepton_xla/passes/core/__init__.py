"""The basis of every pass: the walker, sites, computed weights, statistics."""
