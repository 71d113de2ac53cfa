"""What a report says above the results of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featureinterp.codes.store import CodesStore
from featureinterp.interfaces import settings_of
from featureinterp.jobs.plan import Outcome
from featureinterp.jobs.wiring import Wired
from featureinterp.registry import EXPLAINERS

HOLISTIC = {
    "exact": "exact, every token left out in turn",
    "gradient": "approximate, gradient times embedding",
}


def about(store: CodesStore, parts: Wired, outcome: Outcome) -> dict[str, Any]:
    """Title, subtitle and facts."""
    meta, n = store.meta, len(outcome.status)
    return {
        "title": f"{n} feature{'' if n == 1 else 's'} of {meta['model']['name']}",
        "subtitle": f"SAE {meta['sae']['name']} at {meta['sae']['hook']}, explained and tested",
        "facts": _facts(store, parts),
        "job": outcome.job,
    }


def _facts(store: CodesStore, parts: Wired) -> dict[str, str]:
    from featureinterp import __version__

    meta, job = store.meta, parts.job
    simulates = "simulate" in job.stages
    used = [settings_of(parts.explainer), *([settings_of(parts.simulator)] if simulates else [])]
    asks = EXPLAINERS.has(job.explainer, "asks")
    return {
        "Subject": f"{meta['model']['name']} ({meta['model']['dtype']})",
        "SAE": f"{meta['sae']['name']}, {meta['sae']['architecture']}, {store.n_features:,} features at "
        f"{meta['sae']['hook']}",
        "Corpus": f"{meta['corpus']['name']}: {store.windows.n_tokens:,} tokens in {len(store.windows):,} "
        f"windows of {store.windows.length}",
        "Explainer": f"{job.explainer}, {job.endpoint.model}" if asks else job.explainer,
        **({"Holistic activations": HOLISTIC[job.holistic]} if job.holistic else {}),
        "Simulator": _named(job.simulator.name, used[1]) if simulates else "none",
        "Prompts": ", ".join(f"{s['prompt']} {s['prompt_hash'][:8]}" for s in used if s.get("prompt_hash"))
        or "none",
        "Windows judged": f"{job.plan.n_test} of each kind, from documents that the explainer did not see",
        "Fingerprints": f"model {meta['model']['fingerprint'][:12]}, SAE "
        f"{meta['sae']['fingerprint'][:12]}, windows {meta['corpus']['windows'][:12]}",
        "Made with": f"featureinterp {__version__}",
    }


def _named(simulator: str, settings: Mapping[str, Any]) -> str:
    """A simulator with its model and the dtype that it runs in."""
    model, dtype = settings.get("model", ""), settings.get("dtype")
    return f"{simulator} {model}{f' ({dtype})' if dtype else ''}".strip()
