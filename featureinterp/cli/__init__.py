"""The command line: one small file per verb; each parses, calls the façade and prints."""
