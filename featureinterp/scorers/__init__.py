"""Scores: what a prediction is worth, with intervals, nulls and counts."""
