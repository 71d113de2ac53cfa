"""The demo planned to the machine, and what this machine can do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.api.local import EXPLAINER
from featureinterp.errors import InputError
from featureinterp.stored.sums import read_cache, write_marker
from featureinterp.validation import check_seed

if TYPE_CHECKING:
    from featureinterp.codes.store import CodesStore

PLAN_FILE = "demo.json"
_MOST = 1e12
"""No plan has such a figure; one that is kept is damaged."""
AIM_S = 540.0
"""Seconds that five features should take at most, downloads not counted."""
COLLECT_S = 40.0
"""Seconds after which there should be a first figure."""
TOKENS = (50_000, 40_000, 30_000, 20_000)
TEST_WINDOWS = (8, 7, 6, 5, 4, 3)
_SUBJECT_PER_GFLOPS, _JUDGE_PER_GFLOPS = 5.5, 0.36
"""Tokens per second that the embedded subject (up to its hook, with the SAE) and the embedded judge read per
GFLOP/s of bare matrix products; measured on processors with and without AVX512 (docs/benchmarks.md)."""
_READ_PER_WINDOW = 990
"""Tokens that the judge reads for a feature per test window of each kind: simulations, questions, and both
again for the null.
"""
_WRITE_S_AT_100 = 14.0
"""Seconds of an explanation at 100 GFLOP/s."""
_FIXED_S = 40.0
"""Seconds to load the models, embed windows and write the report."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How much the demo does. ``max_tokens`` of the corpus; ``n_test`` windows of each kind; ``seconds``:
    expected on this machine, from measured speeds: ``subject_per_s`` and ``judge_per_s``, tokens per second;
    ``dtype`` and ``device`` of both."""

    features: int
    max_tokens: int
    n_test: int
    seconds: float
    subject_per_s: float
    judge_per_s: float
    dtype: str
    device: str

    @property
    def text(self) -> str:
        """The plan as a sentence."""
        return (
            f"plan: {self.max_tokens:,} tokens of the corpus, {self.features} features judged on "
            f"{self.n_test} windows of each kind: "
            f"about {max(1, round(self.seconds / 60))} minutes here ({self.subject_per_s:,.0f} tokens/s of "
            "the subject, "
            f"{self.judge_per_s:,.0f} of the judge)"
        )


def plan_demo(
    features: int,
    max_tokens: int | None,
    n_test: int | None,
    *,
    gflops: float,
    dtype: str,
    device: str,
) -> DemoPlan:
    """The largest amounts that keep to the aims at a speed of ``gflops`` (bare matrix products); what is
    given stays as it is.
    """
    subject, judge = _SUBJECT_PER_GFLOPS * gflops, _JUDGE_PER_GFLOPS * gflops
    tokens = max_tokens or next((n for n in TOKENS if n / subject <= COLLECT_S), TOKENS[-1])

    def seconds(windows: int) -> float:
        each = _WRITE_S_AT_100 * 100 / gflops + _READ_PER_WINDOW * windows / judge
        return _FIXED_S + tokens / subject + features * each

    def fits(windows: int) -> bool:
        return seconds(windows) - _FIXED_S <= (AIM_S - _FIXED_S) * max(features, 1) / 5

    windows = n_test or next((n for n in TEST_WINDOWS if fits(n)), TEST_WINDOWS[-1])
    return DemoPlan(
        features, tokens, windows, round(seconds(windows)), round(subject), round(judge), dtype, device
    )


def planned(out: Path, features: int, seed: int, max_tokens: int | None, n_test: int | None) -> DemoPlan:
    """The plan of the demo in ``out``: that of an earlier call for the same features, so that what is there
    is gone on with, or one for this machine.
    """
    check_seed(seed)
    asked = {"features": features, "seed": seed, "max_tokens": max_tokens, "n_test": n_test}
    path = out / PLAN_FILE
    there, known = _kept(path)
    if there is not None and known == asked:
        return there
    plan = plan_here(features, there.max_tokens if there and max_tokens is None else max_tokens, n_test)
    write_marker(path, {"asked": asked, "plan": asdict(plan)})
    return plan


def _kept(path: Path) -> tuple[DemoPlan | None, Any]:
    """The plan of an earlier call and what was asked for; no plan when it is not what was written."""
    import pydantic

    kept = read_cache(path) or {}
    try:
        text = json.dumps(kept.get("plan"), allow_nan=False)
        plan = pydantic.TypeAdapter(DemoPlan).validate_json(text, strict=True)
    except (ValueError, RecursionError):
        return None, None
    sizes = (plan.features, plan.max_tokens, plan.n_test, plan.seconds, plan.subject_per_s, plan.judge_per_s)
    return (plan, kept.get("asked")) if all(0 < n < _MOST for n in sizes) else (None, None)


def plan_here(features: int, max_tokens: int | None = None, n_test: int | None = None) -> DemoPlan:
    """A plan for this machine, whose speed is measured once."""
    from featureinterp.machine import choice, gflops

    for name, value in (("features", features), ("max_tokens", max_tokens), ("n_test", n_test)):
        if value is not None and value < 1:
            raise InputError(f"{name} of {value} is not possible: give at least 1")
    chosen = choice()
    speed = gflops(chosen["dtype"], chosen["device"])
    return plan_demo(
        features, max_tokens, n_test, gflops=speed, dtype=chosen["dtype"], device=chosen["device"]
    )


def first_figures(store: CodesStore, features: Sequence[int]) -> list[str]:
    """A line for each feature before it is explained: how often it fires, how strongly, and on which
    tokens.
    """
    windows, lines = store.windows, []
    for index in features:
        codes = store.feature(index)
        best = codes.positions[codes.values.argsort()[::-1][:100]]
        places = zip(best // windows.length, best % windows.length, strict=True)
        pieces = dict.fromkeys(windows.pieces(int(row))[int(at)].strip() for row, at in places)
        shown = " ".join(f'"{piece}"' for piece in list(pieces)[:6] if piece)
        n, top = len(codes.positions), float(codes.values.max())
        lines.append(
            f"feature {index}: fires on {n:,} tokens ({n / max(store.n_scored, 1):.2%}), up to {top:.1f}: "
            f"{shown}"
        )
    return lines


def machine() -> dict[str, Any]:
    """What this machine can do, which engine and dtype ``auto`` is, and what the embedded models cost here;
    speeds are measured, once.
    """
    from featureinterp.llm.local_server import physical_cores, slots_for
    from featureinterp.machine import choice, gflops, memory_bytes, this_machine

    here, chosen = this_machine(), choice()
    devices = dict.fromkeys(["cpu", chosen["device"]])
    speeds = {
        f"{device} {dtype}": gflops(dtype, device) for device in devices for dtype in ("float32", "bfloat16")
    }
    plan = plan_here(5)
    memory = memory_bytes()
    return {
        "machine": str(here),
        "memory_gb": None if memory is None else round(memory / 2**30, 1),
        "accelerator": here.accelerator,
        "chosen": {name: chosen[name] for name in ("device", "dtype", "why")},
        "gflops": speeds,
        "explainer": {"engine": "llama.cpp", "threads": physical_cores(), "slots": slots_for()},
        "simulator_and_judge": {
            "engine": "transformers",
            "model": EXPLAINER,
            "device": plan.device,
            "dtype": plan.dtype,
        },
        "tokens_per_s": {"subject": plan.subject_per_s, "judge": plan.judge_per_s},
        "demo": asdict(plan),
    }


def machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for a screen: what, and what it is."""
    chosen, explainer, judge, plan = (
        found["chosen"],
        found["explainer"],
        found["simulator_and_judge"],
        DemoPlan(**found["demo"]),
    )
    memory = "not known" if found["memory_gb"] is None else f"{found['memory_gb']:g} GiB"
    return [
        ("machine", f"{found['machine']}, {memory} of memory"),
        ("auto is", f"{chosen['dtype']} on {chosen['device']}: {chosen['why']}"),
        ("measured", ", ".join(f"{speed:,.0f} GFLOP/s in {name}" for name, speed in found["gflops"].items())),
        (
            "explainer",
            f"{explainer['engine']} on the CPU, {explainer['threads']} threads, {explainer['slots']} "
            "requests at once",
        ),
        (
            "simulator and judge",
            f"one model in this process ({judge['engine']}), {judge['dtype']} on {judge['device']}",
        ),
        ("embedded subject", f"about {plan.subject_per_s:,.0f} tokens/s up to its hook, with the SAE"),
        (
            "embedded judge",
            f"about {plan.judge_per_s:,.0f} tokens/s, {_READ_PER_WINDOW:,} for each test window of a feature",
        ),
        ("demo", plan.text.removeprefix("plan: ")),
    ]
