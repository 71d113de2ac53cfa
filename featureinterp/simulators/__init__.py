"""Simulators: from an explanation to the expected activation level of every token."""
