"""Serving by several processes: workers that each do all of it, and the supervisor above them. Nothing is pickled."""
