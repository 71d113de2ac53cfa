"""Whether the service does its work: what ``/health`` tells everybody, without a path or a name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from featureinterp.server.runner import Runner

LATE_S = 30.0
"""A runner that has not finished a round for so long hangs."""


@dataclass(frozen=True)
class Health:
    """``status``: "ok", or "degraded" when something in ``facts["problems"]`` asks for somebody. ``alive``:
    jobs that can be run are.
    """

    status: str
    alive: bool
    facts: dict[str, Any]


def health_of(runner: Runner, queue: int) -> Health:
    """How the runner, the disk and the queue are."""
    last, now, counts = runner.round, time.time(), runner.jobs.counts()
    late = last.at is None or now - last.at > LATE_S
    problems = [
        (late, f"the runner has finished no round for {LATE_S:.0f} s"),
        (last.trouble is not None, f"the runner's last round failed: {last.trouble}"),
        (
            last.disk is not None and not last.disk.enough,
            "the disk is full: no job is started until there is room",
        ),
        (last.stuck > 0, f"{last.stuck} jobs could not be started: the service's log says why"),
        (
            counts["damaged"] > 0,
            f"the folders of {counts['damaged']} jobs are damaged: GET /api/jobs says what to do",
        ),
    ]
    found = [text for wrong, text in problems if wrong]
    disk = last.disk
    facts = {
        "problems": found,
        "runner": {
            "last_round_at": last.at,
            "last_round_s_ago": None if last.at is None else round(max(0.0, now - last.at), 3),
            "trouble": last.trouble,
            "not_started": last.stuck,
        },
        "disk": None
        if disk is None
        else {"free_bytes": disk.free_bytes, "needed_bytes": disk.needed_bytes, "enough": disk.enough},
        "queue": {
            "waiting": counts["queued"],
            "limit": queue,
            "running": counts["running"],
            "parallel": runner.parallel,
            "damaged": counts["damaged"],
            "jobs": sum(counts.values()),
        },
    }
    return Health("degraded" if found else "ok", not late, facts)
