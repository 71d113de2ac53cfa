"""Plots in the project's style, as PNG and SVG. matplotlib is the extra ``figures``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featureinterp.errors import InputError
from featureinterp.files import explained_storage

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "featureinterp",
    "figure.facecolor": "white",
    "text.parse_math": False,  # names come from labels and checkpoints
}


@contextmanager
def figure(
    stem: Path, *, width: float, height: float, panels: int = 1, share_y: bool = False
) -> Iterator[tuple[Any, Any]]:
    """A figure of ``width`` × ``height`` inches and its axes (one, or an array of ``panels`` side by side);
    written as ``stem``.png and .svg when the block ends. The same content gives the same files. Raises
    ``InputError`` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'featureinterp[figures]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        drawn, axes = pyplot.subplots(
            1, panels, figsize=(width, height), layout="constrained", sharey=share_y
        )
        try:
            yield drawn, axes
            with explained_storage(stem):
                stem.parent.mkdir(parents=True, exist_ok=True)
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    drawn.savefig(stem.with_name(f"{stem.name}.{kind}"), dpi=150, metadata=metadata)
        finally:
            pyplot.close(drawn)
