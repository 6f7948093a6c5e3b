"""Whether answers are right: drift of the data, feedback, and alerts."""
