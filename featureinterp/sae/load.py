"""SAEs by name, whatever their layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.registry import LAYOUTS
from featureinterp.resources import data_folder
from featureinterp.sae.base import SparseAutoencoder
from featureinterp.sae.hub import fetch
from featureinterp.sae.layouts import dictionary_learning, gemma_scope, own, saelens
from featureinterp.sae.layouts.checkpoint import ARCHITECTURES, Checkpoint, hook_after_block
from featureinterp.sae.layouts.own import save_sae
from featureinterp.sae.layouts.saelens import save_saelens
from featureinterp.sae.names import SaeSpec, is_published, nearest, resolve

__all__ = ["ARCHITECTURES", "LoadedSae", "load_sae", "save_sae", "save_saelens"]

_log = logging.getLogger("featureinterp")


@dataclass(frozen=True)
class LoadedSae:
    """An SAE with what is known about it. ``model``: what it was trained on, "" when nothing says it.
    ``fingerprint``: SHA-256 of its configuration and weights. ``prepend_bos``: whether a BOS stood in front
    of the text in training, None where nothing says so. ``notes``: what else its files say that a reader of
    results should know."""

    name: str
    sae: SparseAutoencoder
    hook: str
    model: str
    config: Mapping[str, Any]
    fingerprint: str
    prepend_bos: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return self.sae.d_sae


def load_sae(
    name: str = "demo",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: Callable[[str, int, int], None] = lambda *_: None,
) -> LoadedSae:
    """Loads an SAE: ``demo`` (embedded, of ``smollm2-135m-instruct``), a published name (``py_4k_btopk_s0``,
    ``gscope_16k_l0_82``; fetched from the model hub once), ``saelens:RELEASE/ID``, or a folder in this
    project's, SAELens's, dictionary_learning's or Gemma Scope's layout.

    Raises ``UnknownNameError`` when there is none, ``IncompatibleError`` when its files contradict each other
    or the name, and ``DownloadError``.
    """
    checkpoint = read_checkpoint(name, steps)
    hook = hook_after_block(checkpoint.hook, f"the SAE {name}")
    loaded = build(name, replace(checkpoint, hook=hook), device=device, dtype=dtype)
    for note in loaded.notes:
        _log.warning("the SAE %s: %s", name, note)
    return loaded


def build(
    name: str,
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedSae:
    """The SAE of a checkpoint. Raises ``IncompatibleError`` when it cannot encode, or holds values that
    ``dtype`` cannot.
    """
    kind = ARCHITECTURES[checkpoint.architecture]
    tensors = {k: v.to(device, dtype).contiguous() for k, v in checkpoint.tensors.items()}
    settings = {s: checkpoint.settings.get(s) for s in kind.settings}
    sae = kind(tensors, normalize=checkpoint.settings.get("normalize", "none"), **settings)
    sae.check(f"the SAE {name}")
    about = checkpoint.config, checkpoint.fingerprint, checkpoint.prepend_bos, checkpoint.notes
    return LoadedSae(name, sae, checkpoint.hook, checkpoint.model, *about)


def read_checkpoint(name: str, steps: Callable[[str, int, int], None] = lambda *_: None) -> Checkpoint:
    """What :func:`load_sae` reads, before anything is made of it: its site may be one that cannot be used."""
    if name.startswith(saelens.PREFIX):
        return saelens.load_release(name)
    folder = data_folder() / "demo-sae" if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        return _folder(folder)
    if is_published(name):
        return _published(resolve(name), steps)
    near = nearest(name)
    hint = f"; near to it are {', '.join(near)}" if near else ""
    forms = (
        "'demo', a name of 'featureinterp saes list', saelens:RELEASE/ID, or a folder with config.json "
        "and weights.safetensors"
    )
    raise UnknownNameError(f"there is no SAE {name!r}: give {forms}{hint}")


def _folder(folder: Path) -> Checkpoint:
    """A local folder, by the files that lie in it: in this project's layouts, and then in those of other
    packages."""
    for name in _layouts():
        layout = LAYOUTS.load(name)
        if layout.matches(folder):
            found = layout.read(folder)
            if isinstance(found, Checkpoint):
                return found
            raise IncompatibleError(
                f"the layout {name!r} reads {folder} as a {type(found).__name__}: it must give a Checkpoint"
            )
    if (folder / "config.json").exists():
        return own.read_own(folder)  # says what is wrong with it
    raise UnknownNameError(
        f"the folder {folder} holds no SAE: config.json and weights.safetensors, cfg.json, ae.pt or "
        f"params.npz are missing, and no other layout ('featureinterp list layouts') fits"
    )


def _layouts() -> Iterator[str]:
    """This project's own layouts; other packages are only looked for when none of those fits."""
    yield from LAYOUTS.own
    yield from (name for name in LAYOUTS.names() if name not in LAYOUTS.own)


def _published(spec: SaeSpec, steps: Callable[[str, int, int], None]) -> Checkpoint:
    files = fetch(spec, steps)
    if files.config is None:
        return gemma_scope.read_gemma_scope(
            files.weights, model=spec.model, layer=spec.layer, d_in=spec.d_in, d_sae=spec.d_sae
        )
    promised = {
        "architecture": spec.architecture,
        "activation_dim": spec.d_in,
        "dict_size": spec.d_sae,
        "layer": spec.layer,
        "lm_name": spec.model,
    }
    return dictionary_learning.read_dictionary_learning(files.weights, files.config, expected=promised)
