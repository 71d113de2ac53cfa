"""Falsification: what a feature does on text that was written to test what is believed of it."""
