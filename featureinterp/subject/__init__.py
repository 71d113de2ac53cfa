"""The language model under study: loaded once, run up to a hook and no further."""
