"""SAEs by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featureinterp.api.common import SAE, Steps, silent

if TYPE_CHECKING:
    from featureinterp.sae.load import LoadedSae


def saes() -> list[dict[str, Any]]:
    """Every SAE that can be named without asking a hub, each as :func:`sae_info` says it."""
    from featureinterp.sae.info import sae_info
    from featureinterp.sae.names import all_names

    return [sae_info(name) for name in (SAE, *all_names())]


def sae_info(name: str) -> dict[str, Any]:
    """What an SAE's name stands for: repository, file, revision, model, layer, hook, width, architecture,
    codes per token where known, and whether it is in the cache. Asks no network. Raises ``UnknownNameError``
    for a name that stands for nothing."""
    from featureinterp.sae.info import sae_info

    return sae_info(name)


def fetch_sae(name: str, *, steps: Steps = silent) -> LoadedSae:
    """Fetches an SAE into the model hub's cache, and loads it, which checks that it is what its name says."""
    from featureinterp.sae.load import load_sae

    return load_sae(name, steps=steps)
