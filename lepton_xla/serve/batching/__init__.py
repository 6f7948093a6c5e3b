"""Which requests run together, when, and on what: queue, costs, engine."""
