"""Alternative implementations of operations that XLA is slow at, chosen by measurement."""
