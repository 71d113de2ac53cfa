"""Sparse autoencoders: one file per architecture, one interface, one folder format."""
