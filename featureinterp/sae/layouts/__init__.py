"""Readers of checkpoint layouts: one file per layout, each gives a :class:`Checkpoint`."""
