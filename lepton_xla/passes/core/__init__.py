"""What every pass stands on: the one walker, sites, weights that are computed, statistics."""
