"""Keeping libraries' progress bars and notices off the user's screen."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers draws no bars and prints nothing; its settings are put back afterwards.

    What it changes belongs to the whole process, so that threads take turns, and whoever prints meanwhile
    needs a stream of their own.
    """
    with _ONE_AT_A_TIME:
        yield from _quiet()


def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
