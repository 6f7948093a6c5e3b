"""Load on a server, and what comes of it: behind `leptonx load` and the benchmarks."""
