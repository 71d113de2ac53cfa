"""Explainers: from a feature's training windows to what it means."""
