"""Wiring the rooms together: what runs, what is already there, and what is written down."""
