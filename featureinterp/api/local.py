"""Models and SAEs of this process, wired for runs and jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from featureinterp.errors import InputError
from featureinterp.jobs.spec import Job

if TYPE_CHECKING:
    from featureinterp.codes.holistic import HolisticActivations
    from featureinterp.codes.store import CodesStore
    from featureinterp.domain.record import FeatureRecord
    from featureinterp.interfaces import Activator, Simulator, Steerer
    from featureinterp.jobs.run import Local
    from featureinterp.records.build import Neighbours
    from featureinterp.sae.load import LoadedSae
    from featureinterp.subject.load import Subject

EXPLAINER = "qwen2.5-coder-1.5b-instruct"


def holistic_of(
    store: CodesStore,
    model: str | None,
    sae: str | None,
    method: Literal["exact", "gradient"],
    device: str | None,
) -> HolisticActivations:
    """Holistic activations by the model and the SAE that made a run."""
    from featureinterp.codes.holistic import HolisticActivations

    return HolisticActivations.of_run(store, *subject_of(store, model, sae, device), method)


def subject_of(
    store: CodesStore, model: str | None, sae: str | None, device: str | None
) -> tuple[Subject, LoadedSae]:
    """The model and the SAE that made a run; by the names that it recorded when none are given."""
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae
    from featureinterp.subject.load import load_subject

    meta = store.meta
    subject = load_subject(model or meta["model"]["name"], device=device, dtype=live_dtype(store, device))
    return subject, load_sae(sae or meta["sae"]["name"], device=pick_device(device))


def live_dtype(store: CodesStore, device: str | None) -> str:
    """What a run's model runs in now: what the run was made in, where the device has it, else float32."""
    from featureinterp.machine import this_machine

    return this_machine().dtype(None, device, made_in=store.meta["model"]["dtype"])


def near_directions(store: CodesStore, sae: str | None, n: int, device: str | None) -> Neighbours:
    """For a feature, those of the nearest decoder directions in the SAE that made a run."""
    from featureinterp.codes.collect import check_sae
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae
    from featureinterp.sae.neighbours import nearest_directions

    loaded = load_sae(sae or store.meta["sae"]["name"], device=pick_device(device))
    check_sae(store, loaded)

    def near(feature: int) -> tuple[Sequence[int], Sequence[float]]:
        indices, cosines = nearest_directions(loaded.sae.W_dec, [feature], n)
        return indices[0].tolist(), cosines[0].tolist()

    return near


def local_parts() -> Local:
    """What a job may need of the model library; a model that explains and simulates is loaded once."""
    from featureinterp.jobs.run import Local

    loaded: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def load(job: Job, name: str) -> tuple[Any, Any]:
        from featureinterp.subject.load import load_causal_lm

        key = (name, job.simulator_device, job.simulator_dtype)
        if key not in loaded:
            loaded[key] = load_causal_lm(name, device=job.simulator_device, dtype=job.simulator_dtype)
        return loaded[key]

    def dtype(job: Job) -> str:
        from featureinterp.machine import this_machine

        return this_machine().dtype(job.simulator_dtype, job.simulator_device)

    def simulator(job: Job) -> Simulator:
        model = job.simulator_model
        return simulator_of(
            job.simulator,
            lambda: load(job, model),
            model,
            job.simulator_dtype,
            job.simulator_temperature,
            job.simulator_chat,
            job.simulator_device,
        )

    def tokenizer(name: str) -> Any:
        from featureinterp.subject.load import load_tokenizer

        return load_tokenizer(name)

    def causes(job: Job, store: CodesStore) -> Callable[[Iterator[FeatureRecord]], Iterator[FeatureRecord]]:
        assert job.holistic is not None
        return holistic_of(store, job.model, job.sae, job.holistic, job.subject_device).add

    def neighbours(job: Job, store: CodesStore) -> Neighbours:
        return near_directions(store, job.sae, job.records.n_neighbours, job.subject_device)

    def activator(job: Job, store: CodesStore) -> Activator:
        from featureinterp.codes.activator import RunActivator

        return RunActivator(
            store,
            lambda: subject_of(store, job.model, job.sae, job.subject_device),
            dtype=live_dtype(store, job.subject_device),
        )

    def steerer(job: Job, store: CodesStore) -> Steerer:
        from featureinterp.codes.steerer import RunSteerer

        def parts() -> tuple[Any, Any, LoadedSae]:
            from featureinterp.machine import pick_device
            from featureinterp.sae.load import load_sae
            from featureinterp.subject.load import load_causal_lm

            meta, device = store.meta, job.subject_device
            model, tokenizer = load_causal_lm(
                job.model or meta["model"]["name"], device=device, dtype=live_dtype(store, device)
            )
            return model, tokenizer, load_sae(job.sae or meta["sae"]["name"], device=pick_device(device))

        return RunSteerer(store, parts, dtype=live_dtype(store, job.subject_device))

    return Local(simulator, load, dtype, tokenizer, causes, neighbours, activator, steerer)


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
    from featureinterp.subject.load import load_causal_lm

    return simulator_of(
        kind, lambda: load_causal_lm(name, device=device, dtype=dtype), name, dtype, temperature, chat, device
    )


def simulator_of(
    kind: str,
    load: Callable[[], tuple[Any, Any]],
    name: str,
    dtype: str | None,
    temperature: float | None,
    chat: bool,
    device: str | None,
) -> Simulator:
    from featureinterp.machine import this_machine
    from featureinterp.simulate.all_at_once import AllAtOnce
    from featureinterp.simulate.token_wise import TokenWise

    dtype = this_machine().dtype(dtype, device)
    if kind == "token-wise":
        return TokenWise(load, name=name, dtype=dtype, temperature=temperature)
    if kind == "all-at-once":
        return AllAtOnce(load, name=name, dtype=dtype, temperature=temperature, chat=chat)
    raise InputError(f"there is no local simulator {kind!r}: choose from token-wise, all-at-once")
