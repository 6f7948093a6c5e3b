"""Other ways to compute what XLA is slow at, chosen by measuring."""
