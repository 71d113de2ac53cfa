"""What is known of an SAE from its name, without asking the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featureinterp.errors import IncompatibleError
from featureinterp.sae.hub import cached, measured_l0
from featureinterp.sae.names import is_published, resolve

_NONE = dict.fromkeys(("repository", "file", "config_file", "revision", "l0", "measured_l0"))


def sae_info(name: str) -> dict[str, Any]:
    """``name``, ``layout``, ``repository``, ``file``, ``config_file``, ``revision``, ``model``, ``layer``,
    ``hook``, ``d_in``, ``d_sae``, ``architecture``, ``l0`` (that it was trained for, or has on average),
    ``measured_l0`` (of its evaluation file, once that is fetched) and ``cached``; of an SAE in a folder
    ``notes``, what its files say besides.

    A local SAE, or one of SAELens, is loaded for it. Raises ``UnknownNameError`` for a name that stands for
    nothing.
    """
    if is_published(name) and not Path(name).is_dir():
        spec = resolve(name)
        about = spec.to_json()
        about.pop("trainer")
        return {**about, "measured_l0": measured_l0(spec), "cached": cached(spec) is not None}
    from featureinterp.sae.load import build, read_checkpoint

    loaded = build(name, read_checkpoint(name))
    layer = re.match(r"blocks\.([0-9]+)\.", loaded.hook)
    metrics = loaded.config.get("metrics")
    own = {
        "name": name,
        "layout": "saelens" if name.startswith("saelens:") else "folder",
        **_NONE,
        "model": loaded.model or None,
        "layer": int(layer[1]) if layer else None,
        "hook": loaded.hook,
        "d_in": loaded.sae.d_in,
        "d_sae": loaded.n_features,
        "architecture": loaded.sae.architecture,
        "l0": loaded.sae.options.get("k"),
    }
    measured = {"measured_l0": metrics.get("l0") if isinstance(metrics, dict) else None, "cached": True}
    return {**own, **measured, "notes": "; ".join([*loaded.notes, *_unusable(loaded.hook, name)]) or None}


def _unusable(hook: str, name: str) -> list[str]:
    """Why the site cannot be used, if it cannot."""
    from featureinterp.sae.layouts.checkpoint import hook_after_block

    try:
        hook_after_block(hook, f"the SAE {name}")
    except IncompatibleError as error:
        return [str(error)]
    return []
