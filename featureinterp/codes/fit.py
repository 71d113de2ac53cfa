"""Whether an SAE and a model belong together: width, hook, name, family, and what stood in front of the text
in training.
"""

from __future__ import annotations

import logging
from pathlib import Path

from featureinterp.errors import IncompatibleError
from featureinterp.sae.load import LoadedSae
from featureinterp.sae.models import family, is_path, same_or_variant, short_name
from featureinterp.sae.names import names_of_model
from featureinterp.subject.load import PrependToken, SkipFirst, Subject

_log = logging.getLogger("featureinterp")


def check_fit(subject: Subject, sae: LoadedSae) -> None:
    """Raises ``UnknownNameError`` when the model lacks the SAE's hook, and ``IncompatibleError`` when the
    widths differ, when the SAE was trained on another model, or without the BOS that this one reads first.

    A model from a folder may have any name, so its family alone is compared; a variant of the model
    (``gemma-2-2b-it`` of ``gemma-2-2b``) fits, and is said.
    """
    fitting = names_of_model(subject.name)
    choose = (
        f"choose an SAE of this model, such as {fitting[0]}" if fitting else "choose an SAE of this model"
    )
    if sae.sae.d_in != subject.d_model:
        raise IncompatibleError(
            f"the SAE {sae.name} takes activations of width {sae.sae.d_in} (made for "
            f"{sae.model or 'a model that it does not name'}), "
            f"but {subject.name} has width {subject.d_model}: {choose}"
        )
    if not _same_model(subject, sae.model):
        raise IncompatibleError(
            f"the SAE {sae.name} was made for {sae.model}, and not for {subject.name}: {choose}, or give "
            "the model that it names",
        )
    if sae.prepend_bos is False and isinstance(subject.sink, PrependToken):
        raise IncompatibleError(
            f"the SAE {sae.name} was trained on text without a BOS in front (prepend_bos = false), and "
            f"{subject.name} reads one "
            f"before every window: its activations would be other ones; {choose} that was trained with it",
        )
    subject.check_hook(sae.hook)
    if sae.prepend_bos and isinstance(subject.sink, SkipFirst):
        _log.warning(
            "the SAE %s was trained with a BOS in front of the text, and %s has none", sae.name, subject.name
        )


def _same_model(subject: Subject, model: str) -> bool:
    """Whether the subject may be the model of that name; one without a name, or that is a place on a disk,
    may be any.
    """
    if not model or is_path(model):
        return True
    if is_path(subject.name) or Path(subject.name).is_dir():
        kind = family(model)
        found = str(getattr(getattr(subject.model, "config", None), "model_type", "") or "")
        return kind is None or not found or found.removesuffix("_text") == kind
    if named_alike(model, subject.name) and short_name(model) != short_name(subject.name):
        _log.warning("the SAE was made for %s, of which %s is taken to be a variant", model, subject.name)
    return named_alike(model, subject.name)


def named_alike(model: str, other: str) -> bool:
    """Whether two names may be those of one model, or of it and a variant; a name that says nothing may be
    any.
    """
    return not model or is_path(model) or is_path(other) or same_or_variant(model, other)
