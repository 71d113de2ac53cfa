"""Which models a job has settled on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimulatorChoice:
    """``name``: in the registry of simulators. ``model``: of a simulator that runs in this process, with its
    ``device`` and ``dtype`` (None: no model of this process is asked for). ``temperature``: sharpens (below
    1) the level distribution, None: the simulator's own. ``chat``: its prompt as turns of a chat."""

    name: str
    model: str
    device: str | None = None
    dtype: str | None = None
    temperature: float | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class SubjectChoice:
    """Where the model and the SAE of a run are now, and what they run on."""

    model: str
    sae: str
    device: str
    dtype: str
