"""The log's lines in W&B or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from featureinterp.errors import InputError
from featureinterp.training.settings import Recipe, TrackingTable

Track = Callable[[dict[str, Any]], None]


def check_tracker(table: TrackingTable) -> None:
    """Raises ``InputError`` when the package of the tracker that is asked for is missing, before hours are
    spent.
    """
    if table.to == "none":
        return
    try:
        import_module(table.to)
    except ImportError as error:
        raise InputError(
            f"tracking.to = {table.to!r} needs its package: install featureinterp[{table.to}]"
        ) from error


@contextmanager
def open_tracker(table: TrackingTable, folder: Path, recipe: Recipe, leads: bool) -> Iterator[Track]:
    """Within the block, a function that is given every line of the log. Raises ``InputError`` when the
    tracker's package is missing.
    """
    if table.to == "none" or not leads:
        yield lambda _: None
    elif table.to == "tensorboard":
        yield from _tensorboard(folder)
    else:
        yield from _wandb(table, folder, recipe)


def _tensorboard(folder: Path) -> Iterator[Track]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tracking.to = 'tensorboard' needs its package: install featureinterp[tensorboard]"
        ) from error
    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def track(line: dict[str, Any]) -> None:
            for name, value in numbers(line).items():
                writer.add_scalar(f"train/{name}", value, line["step"])

        yield track


def _wandb(table: TrackingTable, folder: Path, recipe: Recipe) -> Iterator[Track]:
    try:
        import wandb
    except ImportError as error:
        raise InputError("tracking.to = 'wandb' needs its package: install featureinterp[wandb]") from error
    config = recipe.model_dump(mode="json")
    with wandb.init(
        project=table.project,
        entity=table.entity,
        name=table.name or folder.name,
        dir=str(folder),
        config=config,
    ) as run:
        yield lambda line: run.log(
            {f"train/{name}": value for name, value in numbers(line).items()}, step=line["step"]
        )


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What of a line is a curve."""
    return {name: value for name, value in line.items() if name not in ("step", "steps", "left_s")}
