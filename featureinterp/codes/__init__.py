"""Sparse codes of a whole corpus on disk, by feature."""
