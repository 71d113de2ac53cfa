"""Which names stand for one model, and of which family a name is, as far as names say it."""

from __future__ import annotations

import re

_ALIASES = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1", "tiny-stories-33m": "tinystories-33m"}
"""Names that are used besides those of the model hub, without owners, in lower case."""
_OTHER_WEIGHTS = re.compile(r"deduped|v\d|step\d")
"""What makes another model of a name, and not a variant that was trained on from it."""
_FAMILIES = (
    (r"gpt2|distilgpt2", "gpt2"),
    (r"pythia|gpt-neox", "gpt_neox"),
    (r"gpt-neo\b", "gpt_neo"),
    (r"gpt-j", "gptj"),
    (r"opt-\d", "opt"),
    (r"gemma-2-", "gemma2"),
    (r"gemma-3-", "gemma3"),
    (r"gemma-\d+b", "gemma"),
    (r"llama|deepseek-r1-distill-llama|smollm2|smollm-", "llama"),
    (r"mistral", "mistral"),
    (r"qwen1\.5|qwen2|deepseek-r1-distill-qwen", "qwen2"),
    (r"qwen3", "qwen3"),
)
_LAYER_NORM = ("gpt2", "gpt_neox", "gpt_neo", "gptj", "opt")


def short_name(model: str) -> str:
    """The name without its owner, in lower case, as the model hub calls it."""
    name = model.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return _ALIASES.get(name, name)


def is_path(model: str) -> bool:
    """Whether a name is a place on a disk, which may hold any model."""
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def same_or_variant(model: str, other: str) -> bool:
    """Whether ``other`` is ``model`` by another name, or one that was trained on from it (``gemma-2-2b-it``
    of ``gemma-2-2b``).
    """
    a, b = short_name(model), short_name(other)
    rest = b[len(a) :]
    return b.startswith(a) and (not rest or (rest[0] in "-_." and not _OTHER_WEIGHTS.match(rest[1:])))


def family(model: str) -> str | None:
    """The ``model_type`` of a name's configuration; None for a name that says nothing."""
    name = short_name(model)
    return next((kind for pattern, kind in _FAMILIES if re.match(pattern, name)), None)


def has_layer_norm(model: str) -> bool | None:
    """Whether a model's norms take the mean away, which makes its residual stream free to be centred; None:
    not known.
    """
    kind = family(model)
    return None if kind is None else kind in _LAYER_NORM
