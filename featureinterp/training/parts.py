"""What a recipe needs: its model, corpus and settings as they are on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featureinterp.corpus.text import Corpus, load_corpus
from featureinterp.corpus.windows import WindowPolicy
from featureinterp.errors import IncompatibleError
from featureinterp.files import explained_storage
from featureinterp.machine import AUTO, pick_device, this_machine
from featureinterp.subject.load import Subject, as_subject, load_causal_lm
from featureinterp.training.extract import Extracted, ExtractSettings, extract
from featureinterp.training.ranks import own_device
from featureinterp.training.settings import Recipe

Steps = Callable[[str, int, int], None]


class Parts:
    """What a recipe needs of the subject, loaded when it is first asked for."""

    def __init__(self, recipe: Recipe, device: str | None) -> None:
        self.recipe, self.device = recipe, own_device(pick_device(device))
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> tuple[Any, Any]:
        """The whole model, and its tokenizer."""
        if self._model is None:
            table = self.recipe.subject
            self._model, self._tokenizer = load_causal_lm(
                table.model, device=str(self.device), dtype=table.dtype
            )
        return self._model, self._tokenizer

    @property
    def subject(self) -> Subject:
        """The model up to its head."""
        return as_subject(self.recipe.subject.model, *self.model)

    @property
    def policy(self) -> WindowPolicy:
        """How the corpus is cut."""
        c = self.recipe.corpus
        return WindowPolicy(c.window, min(c.min_window, c.window), c.max_tokens, c.max_per_document)

    def extract_settings(self, *, only_held_out: bool = False) -> ExtractSettings:
        """How activations are stored."""
        r = self.recipe
        return ExtractSettings(
            r.corpus.held_out,
            r.store.dtype,
            r.store.shuffle,
            r.store.shard_rows,
            only_held_out,
            seed=r.training.seed,
        )

    @property
    def corpus(self) -> Corpus:
        """The text."""
        return load_corpus(
            self.recipe.corpus.name,
            text_field=self.recipe.corpus.text_field,
            document_separator=self.recipe.corpus.document_separator,
        )

    def extract(
        self, folder: Path, steps: Steps, settings: ExtractSettings | None = None, **how: Any
    ) -> Extracted:
        """The extraction in ``folder``, made, gone on with or reused; ``how``: ``replace``, ``anew`` and
        ``held`` of :func:`featureinterp.training.extract.extract`.
        """
        corpus = self.corpus
        return extract(
            self.subject,
            self.recipe.subject.hook,
            corpus,
            folder,
            self.policy,
            settings or self.extract_settings(),
            batch_tokens=self.recipe.training.batch_tokens,
            progress=lambda done, total: steps("tokens", done, total),
            **how,
        )


def fitted(recipe: Recipe, source: dict[str, Any]) -> Recipe:
    """The recipe with the model and hook of activations that were given, where it names none itself. Raises
    ``IncompatibleError`` where it names another hook or dtype; a model may lie elsewhere now, and run in
    another dtype where this machine lacks theirs."""
    theirs = {"hook": source["hook"], "model": source["model"]["name"], "dtype": source["model"]["dtype"]}
    named = {name: getattr(recipe.subject, name) for name in recipe.subject.model_fields_set}
    if named.get("dtype") == AUTO:
        del named["dtype"]
    for name in ("hook", "dtype"):
        if named.get(name, theirs[name]) != theirs[name]:
            raise IncompatibleError(
                f"the activations are of the {name} {theirs[name]!r}, and the recipe says {named[name]!r}: "
                "change one of them"
            )
    return recipe.model_copy(
        update={"subject": recipe.subject.model_copy(update={**theirs, "dtype": AUTO, **named})}
    )


def resolved(recipe: Recipe, device: str | None, made_in: str | None = None) -> Recipe:
    """The recipe with what ``auto`` stands for on this machine; where activations are given that were
    ``made_in`` a dtype, in that if the device has it.
    """
    machine, training = this_machine(), recipe.training
    subject = recipe.subject.model_copy(
        update={"dtype": machine.dtype(recipe.subject.dtype, device, made_in=made_in)}
    )
    precision = machine.dtype(training.precision, device)
    return recipe.model_copy(
        update={"subject": subject, "training": training.model_copy(update={"precision": precision})}
    )


def writable(out: Path) -> None:
    """Raises ``StorageError`` when nothing can be written into a folder. Several processes may ask at
    once.
    """
    with explained_storage(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
