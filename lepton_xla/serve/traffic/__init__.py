"""Decides about traffic: shadows are compared, rollouts go on or back, and a bandit learns from feedback."""
