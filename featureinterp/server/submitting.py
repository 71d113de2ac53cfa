"""Jobs that people submit: what is allowed, and into the queue with it."""

from __future__ import annotations

from featureinterp.errors import UnknownNameError
from featureinterp.server.disk import room
from featureinterp.server.folder import JobsFolder, JobView
from featureinterp.server.forms import Rules, Submission
from featureinterp.server.refusals import NO_ROOM, RefusedError


def run_names(rules: Rules) -> list[str]:
    """Names of the runs that can be explained."""
    if not rules.runs.is_dir():
        return []
    return sorted(p.name for p in rules.runs.iterdir() if (p / "codes" / "codes.json").is_file())


def check_room(rules: Rules) -> None:
    """Refuses when the disk has no room for another job."""
    if not room(rules.jobs, rules.min_free).enough:
        raise RefusedError(503, NO_ROOM, {"Retry-After": "60"})


def submit_job(submission: Submission, rules: Rules, jobs: JobsFolder) -> JobView:
    """Puts a job that the rules allow into the queue. Raises ``UnknownNameError`` for names they lack."""
    from featureinterp import api
    from featureinterp.jobs.records import parse_features
    from featureinterp.jobs.spec import make_job

    if submission.run not in run_names(rules):
        raise UnknownNameError(f"there is no run {submission.run!r}: GET /api/runs lists them")
    if submission.llm is not None and submission.llm not in rules.endpoints:
        raise UnknownNameError(f"there is no endpoint {submission.llm!r}: GET /api/endpoints lists them")
    model = submission.simulator_model or rules.simulator_models[0]
    if model not in rules.simulator_models:
        raise UnknownNameError(
            f"the simulator {model[:60]!r} is not allowed: choose from {', '.join(rules.simulator_models)}"
        )
    check_room(rules)
    folder = rules.runs / submission.run
    parse_features(submission.features, api.open_run(folder))
    job = make_job(
        run=folder,
        features=submission.features,
        llm=submission.llm,
        stages=tuple(submission.stages),
        explainer=submission.explainer,
        holistic=submission.holistic,
        style=submission.style,
        rule_cap=submission.rule_cap,
        simulator=submission.simulator,
        simulator_model=model,
        plan={"n_test": submission.n_test, "seed": submission.seed},
        records={"seed": submission.seed},
        budget={"usd": submission.budget_usd, "minutes": submission.max_minutes},
    )
    return jobs.view(jobs.submit(job, submission.model_dump(mode="json"), queue=rules.queue))
