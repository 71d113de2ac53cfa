"""What the verbs that follow a recipe have in common: its options, and its notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from featureinterp.cli.options import (
    DocumentSeparator,
    HeldOut,
    ModelDtype,
    Reading,
    TextField,
)
from featureinterp.cli.screen import put
from featureinterp.cli.verb import Else
from featureinterp.domain.choices import StoredDtype

THE_RECIPES = "the recipe's own"


@dataclass(frozen=True)
class RecipeOptions(Reading):
    """A recipe, and settings of it that are changed."""

    config: Annotated[
        str | None,
        typer.Option(
            "--config", help="Recipe: a TOML file, or 'demo'. What is given besides goes before what it says."
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="A setting of the recipe, such as sae.k=64; can be given again.",
        ),
    ] = None
    text_field: Annotated[TextField, Else("the recipe's own, text")] = None
    document_separator: Annotated[DocumentSeparator, Else("recognised")] = None
    held_out: Annotated[HeldOut, Else("the recipe's own, 0.1")] = None
    dtype: Annotated[ModelDtype, Else("the recipe's own, auto")] = None
    store_dtype: Annotated[
        StoredDtype | None,
        typer.Option(help="How activations are stored."),
        Else("the recipe's own, float16"),
    ] = None

    def changes(self, **options: Any) -> dict[str, Any]:
        """What is changed, by its place in the recipe (``sae__k`` is ``sae.k``); None: not given."""
        text = {
            "corpus__text_field": self.text_field,
            "corpus__document_separator": self.document_separator,
            "corpus__held_out": self.held_out,
        }
        numbers = {"subject__dtype": self.dtype, "store__dtype": self.store_dtype}
        return settings_of(self.settings or [], **text, **numbers, **options)


def settings_of(settings: list[str], **options: Any) -> dict[str, Any]:
    """Settings by their place in the recipe; options that were not given are left out."""
    from featureinterp.errors import InputError
    from featureinterp.training.settings import value_of

    found: dict[str, Any] = {
        key.replace("__", "."): value for key, value in options.items() if value is not None
    }
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r} has no value: write TABLE.KEY=VALUE, such as sae.k=64")
        found[key.strip()] = value_of(value.strip())
    return found


def tell(notes: list[str]) -> None:
    """Notes on what was done, for a person."""
    for note in notes:
        put(f"Note: {note}")
