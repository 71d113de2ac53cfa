"""What an SAE's name stands for: which files on the model hub, of which model, hook, width and architecture.
Looks at nothing but the name.

``py_4k_btopk_s0`` and the other 251 names of SAEBench, ``gscope_16k_l0_82`` and ``gscope_layer20_65k_l0_114``
of Gemma Scope. A name may end in ``@REVISION`` (a branch, a tag or a commit of the repository).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featureinterp.errors import UnknownNameError

Layout = Literal["dictionary_learning", "gemma-scope"]


@dataclass(frozen=True, slots=True)
class SaeSpec:
    """A published SAE. ``file`` and ``config_file`` lie in ``repository`` (``config_file`` None: there is
    none). ``hook``: the residual stream after block ``layer``, counted from 0. ``l0``: codes per token that
    it was trained for, or has on average; None where only its evaluation file says.
    ``trainer``: its number among those of its folder; None where the name gives the file itself."""

    name: str
    layout: Layout
    repository: str
    file: str
    config_file: str | None
    revision: str
    model: str
    layer: int
    d_in: int
    d_sae: int
    architecture: str
    l0: int | None
    trainer: int | None = None

    @property
    def hook(self) -> str:
        """The hook's usual name."""
        return f"blocks.{self.layer}.hook_resid_post"

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {**asdict(self), "hook": self.hook}


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of SAEBench."""

    hub: str
    layer: int
    d_in: int


@dataclass(frozen=True, slots=True)
class _Architecture:
    """An architecture of SAEBench: its folder's name in either style, and what its six trainers were trained
    for.
    """

    kind: str
    camel: str
    snake: str
    l0: bool


_MODELS = {
    "py": _Model("EleutherAI/pythia-160m-deduped", 8, 768),
    "gem": _Model("google/gemma-2-2b", 12, 2304),
}
_POWERS = {"4k": 12, "16k": 14, "65k": 16}
_TRAINED_L0 = (20, 40, 80, 160, 320, 640)
_ARCHITECTURES = {
    "btopk": _Architecture("batch_topk", "BatchTopK", "batch_top_k", True),
    "matbtopk": _Architecture("matryoshka_batch_topk", "MatryoshkaBatchTopK", "matryoshka_batch_top_k", True),
    "gated": _Architecture("gated", "GatedSAE", "gated", False),
    "jumprelu": _Architecture("jumprelu", "JumpRelu", "jump_relu", True),
    "topk": _Architecture("topk", "TopK", "top_k", True),
    "relu": _Architecture("relu", "Standard", "standard_new", False),
    "pan": _Architecture("p_anneal", "PAnneal", "p_anneal", False),
}

_SCOPE_REPOSITORY = "google/gemma-scope-2b-pt-res"
_SCOPE_MODEL = _Model("google/gemma-2-2b", 12, 2304)
_SCOPE_WIDTHS = {
    "16k": 2**14,
    "32k": 2**15,
    "65k": 2**16,
    "131k": 2**17,
    "262k": 2**18,
    "524k": 2**19,
    "1m": 2**20,
}
_SCOPE_LAYERS = {"16k": range(26), "65k": range(26), "1m": (5, 12, 19)}
"""Where a width exists; the others on layer 12 alone."""
_SCOPE_L0 = {
    "16k": (22, 41, 82, 176, 445),
    "32k": (12, 22, 40, 76, 155, 360),
    "65k": (21, 38, 72, 141, 297),
    "131k": (12, 20, 36, 67, 129, 264),
    "262k": (11, 21, 36, 67, 121, 243),
    "524k": (22, 29, 46, 65, 115, 227),
    "1m": (19, 26, 58, 73, 107, 207),
}
"""Mean codes per token of those on layer 12; other layers have values of their own, which only the repository
lists.
"""
_SCOPE = re.compile(r"gscope(?:_layer([0-9]{1,3}))?_([0-9a-z]+)_l0_([0-9]{1,6})")
_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._/-]*")


def saebench_names() -> list[str]:
    """All 252."""
    return [
        f"{model}_{width}_{arch}_s{n}"
        for model in _MODELS
        for width in _POWERS
        for arch in _ARCHITECTURES
        for n in range(6)
    ]


def gemma_scope_names() -> list[str]:
    """Those of layer 12, whose mean codes per token are known."""
    return [f"gscope_{width}_l0_{l0}" for width, values in _SCOPE_L0.items() for l0 in values]


def all_names() -> list[str]:
    """Every name that is known without asking a hub."""
    return [*saebench_names(), *gemma_scope_names()]


RESULTS_REPOSITORY = "adamkarvonen/sae_bench_results_0125"


def interpretability_results(name: str) -> str:
    """Where ``RESULTS_REPOSITORY`` has the evaluation, with examples, of an SAE of SAEBench. Raises
    ``UnknownNameError`` for other SAEs.
    """
    spec = resolve(name)
    if spec.layout != "dictionary_learning":
        raise UnknownNameError(
            f"SAEBench published no examples for {name!r}: only its own SAEs have them, such as "
            "py_4k_btopk_s0"
        )
    _, width, arch, _ = spec.name.split("_")
    short = spec.model.split("/")[1]
    folder = f"saebench_{short}_width-2pow{_POWERS[width]}_date-0108"
    trainer = (
        f"{folder}_{_ARCHITECTURES[arch].camel}_{short}__0108_resid_post_layer_{spec.layer}"
        f"_trainer_{spec.trainer}"
    )
    return f"autointerp_with_generations/{folder}/{trainer}_eval_results.json"


def names_of_model(model: str) -> list[str]:
    """The names of SAEs of a model, by its name on the hub with or without its owner."""
    short = model.rsplit("/", 1)[-1].lower()
    return [name for name in all_names() if resolve(name).model.rsplit("/", 1)[-1].lower() == short]


def is_published(name: str) -> bool:
    """Whether a name has the form of a published SAE's, right or wrong."""
    return name.split("_")[0] in (*_MODELS, "gscope") and "/" not in name.split("@")[0]


def resolve(name: str) -> SaeSpec:
    """What a name stands for. Raises ``UnknownNameError`` that says which part of it is wrong and what would
    be right.
    """
    plain, _, revision = name.partition("@")
    if "@" in name and not _REVISION.fullmatch(revision):
        raise UnknownNameError(f"{revision!r} is no revision: write NAME@BRANCH, NAME@TAG or NAME@COMMIT")
    return (
        _gemma_scope(plain, revision or "main")
        if plain.startswith("gscope")
        else _saebench(plain, revision or "main")
    )


def _saebench(name: str, revision: str) -> SaeSpec:
    parts = name.split("_")
    asked: tuple[tuple[str, Collection[str]], ...] = (
        ("model", _MODELS),
        ("width", _POWERS),
        ("architecture", _ARCHITECTURES),
        ("number", {f"s{n}": n for n in range(6)}),
    )
    for (what, known), part in zip(asked, parts, strict=False):
        if part not in known:
            raise _unknown(name, f"{part!r} is no {what}, those are {_listed(known)}")
    if len(parts) != len(asked):
        what = (
            f"{'_'.join(parts[4:])!r} after the number stands for nothing"
            if len(parts) > 4
            else f"the {asked[len(parts)][0]} is missing"
        )
        raise _unknown(name, what)
    model, architecture = _MODELS[parts[0]], _ARCHITECTURES[parts[2]]
    power, trainer = _POWERS[parts[1]], int(parts[3][1:])
    short = model.hub.split("/")[1]
    if parts[0] == "gem" and power > 12:
        repository = f"canrager/saebench_{short}_width-2pow{power}_date-0107"
        folder = f"{short}_{architecture.snake}_width-2pow{power}_date-0107"
    else:
        repository = f"adamkarvonen/saebench_{short}_width-2pow{power}_date-0108"
        folder = f"{architecture.camel}_{short}__0108"
    place = f"{folder}/resid_post_layer_{model.layer}/trainer_{trainer}"
    return SaeSpec(
        name,
        "dictionary_learning",
        repository,
        f"{place}/ae.pt",
        f"{place}/config.json",
        revision,
        model.hub,
        model.layer,
        model.d_in,
        2**power,
        architecture.kind,
        _TRAINED_L0[trainer] if architecture.l0 else None,
        trainer,
    )


def _gemma_scope(name: str, revision: str) -> SaeSpec:
    match = _SCOPE.fullmatch(name)
    if match is None:
        raise _unknown(name, "a Gemma Scope name is gscope_WIDTH_l0_N or gscope_layerN_WIDTH_l0_N")
    width = {"128k": "131k"}.get(match[2], match[2])
    layer, l0 = int(match[1] or 12), int(match[3])
    if width not in _SCOPE_WIDTHS:
        raise _unknown(name, f"{width!r} is no width, those are {_listed(_SCOPE_WIDTHS)}")
    layers = _SCOPE_LAYERS.get(width, (12,))
    if layer not in layers:
        where = (
            f"layers {layers[0]} to {layers[-1]}"
            if isinstance(layers, range)
            else "layer " + _listed(map(str, layers))
        )
        raise _unknown(name, f"the width {width} exists on {where}")
    if layer == 12 and l0 not in _SCOPE_L0[width]:
        raise _unknown(name, f"the width {width} on layer 12 has l0 {_listed(map(str, _SCOPE_L0[width]))}")
    file = f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"
    model = _SCOPE_MODEL
    return SaeSpec(
        name,
        "gemma-scope",
        _SCOPE_REPOSITORY,
        file,
        None,
        revision,
        model.hub,
        layer,
        model.d_in,
        _SCOPE_WIDTHS[width],
        "jumprelu",
        l0,
    )


def _listed(values: Iterable[object]) -> str:
    found = [str(v) for v in values]
    return ", ".join(found[:-1]) + " and " + found[-1] if len(found) > 1 else found[0]


def nearest(name: str, n: int = 3) -> list[str]:
    """The known names that look most like this one."""
    return difflib.get_close_matches(name, list(_candidates(name)), n, 0.4)


def _candidates(name: str) -> Iterator[str]:
    yield from all_names()
    yield "demo"
    match = re.match(r"gscope_(layer\d+)_", name)
    if match:
        yield from (n.replace("gscope_", f"gscope_{match[1]}_") for n in gemma_scope_names())


def _unknown(name: str, why: str) -> UnknownNameError:
    return UnknownNameError(
        f"there is no SAE {name!r}: {why}; near to it are {_listed(nearest(name) or all_names()[:3])}"
    )
