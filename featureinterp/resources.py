"""Where the files that travel with the package are: inside it when installed, beside it in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def _folder(name: str) -> Path:
    package = Path(str(files("featureinterp")))
    inside = package / "_resources" / name
    return inside if inside.is_dir() else package.parent / name


def prompts_folder() -> Path:
    """The folder of prompt files."""
    return _folder("prompts")


def data_folder() -> Path:
    """The folder of embedded data (the demo SAE)."""
    return _folder("data")
