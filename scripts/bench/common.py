"""Shared by the benchmarks: arguments, alternating rounds, one JSON line."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from featureinterp.machine import choice

_RAN_ON: dict[str, str] = {}


def arguments(description: str) -> argparse.Namespace:
    """``--quick`` for a short run, ``--device`` cpu or cuda (the GPU when there is one), ``--rounds``.
    ``dtype``: the fastest of the device.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape",
        default="smollm2-135m",
        help="of the subject, where a benchmark has one: a name of shapes.py",
    )
    parser.add_argument(
        "--rounds", type=int, default=None, help="how often each side is timed; the medians are compared"
    )
    args = parser.parse_args()
    chosen = choice(device=args.device)
    args.dtype = chosen["dtype"]
    _RAN_ON.update(machine=chosen["machine"], dtype=chosen["dtype"])
    return args


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, with the GPU's queue drained on both sides."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object], limit: Callable[[], object], device: str, rounds: int
) -> tuple[float, float]:
    """Median seconds of both, timed in turn so that a slow moment of the machine meets both; each runs once
    before.
    """
    limit()
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(seconds(ours, device))
        times[1].append(seconds(limit, device))
    return statistics.median(times[0]), statistics.median(times[1])


def report(name: str, ours: float, limit: float, ratio: float, **more: object) -> None:
    """The one line that a benchmark prints; it names the machine and the dtype that the device computes
    fastest.
    """
    print(
        json.dumps(
            {
                "name": name,
                "ours": round(ours, 6),
                "limit": round(limit, 6),
                "ratio": round(ratio, 3),
                **more,
                **_RAN_ON,
            }
        ),
        flush=True,
    )
