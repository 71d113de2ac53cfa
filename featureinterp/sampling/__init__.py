"""From codes to records: the windows that show what a feature does and does not do."""
