"""Models and SAEs of this process, wired for runs and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from featureinterp.errors import InputError

if TYPE_CHECKING:
    from featureinterp.codes.store import CodesStore
    from featureinterp.domain.choice import SubjectChoice
    from featureinterp.interfaces import Activator, Simulator, Steerer
    from featureinterp.jobs.resolved import ResolvedJob
    from featureinterp.jobs.wiring import Local, Records
    from featureinterp.live.holistic import HolisticActivations
    from featureinterp.sae.load import LoadedSae
    from featureinterp.sampling.kinds import Neighbours
    from featureinterp.subject.load import Subject

EXPLAINER = "qwen2.5-coder-1.5b-instruct"


def holistic_of(
    store: CodesStore, choice: SubjectChoice, method: Literal["exact", "gradient"]
) -> HolisticActivations:
    """Holistic activations by the model and the SAE that made a run."""
    from featureinterp.live.holistic import HolisticActivations

    return HolisticActivations.of_run(store, *subject_of(choice), method)


def subject_of(choice: SubjectChoice) -> tuple[Subject, LoadedSae]:
    """A run's model and SAE."""
    from featureinterp.subject.load import load_subject

    return load_subject(choice.model, device=choice.device, dtype=choice.dtype), sae_of(choice)


def sae_of(choice: SubjectChoice) -> LoadedSae:
    """A run's SAE."""
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae

    return load_sae(choice.sae, device=pick_device(choice.device))


def near_directions(store: CodesStore, choice: SubjectChoice, n: int) -> Neighbours:
    """For a feature, those of the nearest decoder directions in the SAE that made a run."""
    from featureinterp.codes.collect import check_sae
    from featureinterp.sae.neighbours import nearest_directions

    loaded = sae_of(choice)
    check_sae(store, loaded)

    def near(feature: int) -> tuple[Sequence[int], Sequence[float]]:
        indices, cosines = nearest_directions(loaded.sae.W_dec, [feature], n)
        return indices[0].tolist(), cosines[0].tolist()

    return near


def local_parts() -> Local:
    """What a job may need of the model library; a model that explains and simulates is loaded once."""
    from featureinterp.jobs.wiring import Local

    loaded: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def load(name: str, *, device: str | None, dtype: str | None) -> tuple[Any, Any]:
        from featureinterp.subject.load import load_causal_lm

        key = (name, device, dtype)
        if key not in loaded:
            loaded[key] = load_causal_lm(name, device=device, dtype=dtype)
        return loaded[key]

    def tokenizer(name: str) -> Any:
        from featureinterp.subject.load import load_tokenizer

        return load_tokenizer(name)

    def causes(job: ResolvedJob, store: CodesStore) -> Records:
        assert job.holistic is not None and job.subject is not None
        return holistic_of(store, job.subject, job.holistic).add

    def neighbours(job: ResolvedJob, store: CodesStore) -> Neighbours:
        assert job.subject is not None
        return near_directions(store, job.subject, job.policy.n_neighbours)

    def activator(job: ResolvedJob, store: CodesStore) -> Activator:
        from featureinterp.live.activator import RunActivator

        choice = job.subject
        assert choice is not None
        return RunActivator(store, lambda: subject_of(choice), dtype=choice.dtype)

    def steerer(job: ResolvedJob, store: CodesStore) -> Steerer:
        from featureinterp.live.steerer import RunSteerer

        choice = job.subject
        assert choice is not None

        def parts() -> tuple[Any, Any, LoadedSae]:
            from featureinterp.subject.load import load_causal_lm

            made = load_causal_lm(choice.model, device=choice.device, dtype=choice.dtype)
            return *made, sae_of(choice)

        return RunSteerer(store, parts, dtype=choice.dtype)

    return Local(load, tokenizer, causes, neighbours, activator, steerer)


def local_simulator(
    name: str = EXPLAINER,
    *,
    kind: str = "token-wise",
    device: str | None = None,
    dtype: str | None = None,
    temperature: float | None = None,
    chat: bool = False,
) -> Simulator:
    """A simulator on a local transformers model, which is loaded when it is first used: ``token-wise`` or
    ``all-at-once`` (``docs/scores.md``). ``temperature``: the simulator's own when not given. ``chat``: the
    all-at-once prompt as turns of a chat."""
    from featureinterp.local.all_at_once import AllAtOnce
    from featureinterp.local.token_wise import TokenWise
    from featureinterp.machine import this_machine
    from featureinterp.subject.load import load_causal_lm

    def load() -> tuple[Any, Any]:
        return load_causal_lm(name, device=device, dtype=dtype)

    runs_in = this_machine().dtype(dtype, device)
    if kind == "token-wise":
        return TokenWise(load, name=name, dtype=runs_in, temperature=temperature)
    if kind == "all-at-once":
        return AllAtOnce(load, name=name, dtype=runs_in, temperature=temperature, chat=chat)
    raise InputError(f"there is no local simulator {kind!r}: choose from token-wise, all-at-once")
