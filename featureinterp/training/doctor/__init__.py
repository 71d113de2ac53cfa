"""The doctor: checks that find the known mistakes on the way from a corpus to an SAE, each with the figure
that it measured.
"""
