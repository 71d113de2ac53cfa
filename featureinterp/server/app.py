"""The HTTP interface: submit, list, watch and cancel jobs, read their results."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import fastapi
import pydantic
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse

from featureinterp import __version__
from featureinterp.errors import DamagedStoreError, FeatureInterpError, UnknownNameError
from featureinterp.server.disk import room, says_full
from featureinterp.server.folder import JobsFolder, JobView, QueueFullError, WrongStateError, is_locked
from featureinterp.server.gate import Gate
from featureinterp.server.health import health_of
from featureinterp.server.page import PAGE, front_page
from featureinterp.server.runner import MIN_FREE, Runner
from featureinterp.server.views import PASSING, DamagedJobError
from featureinterp.stored.sums import checked_lines, read_marker
from featureinterp.visible import visible_json

_SHOWN = 300
"""So much of a mistake is repeated in the answer to it, in characters."""
MAX_LINE = 1 << 25
"""No feature with its windows is larger, in bytes."""
_log = logging.getLogger("featureinterp.server")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Rules:
    """What requests may name. ``runs``: the folder whose run folders can be explained. ``endpoints``: names
    of the configuration file; the embedded model is always allowed. ``simulator_models``: names of local
    simulators. ``token``: what every request must carry; None: none is needed. ``queue``: how many jobs may
    wait. ``parallel``: how many run at once. ``min_free``: with less room on the disk, in bytes, no job is
    taken on or started."""

    jobs: Path
    runs: Path
    endpoints: tuple[str, ...] = ()
    simulator_models: tuple[str, ...] = ("qwen2.5-coder-1.5b-instruct",)
    token: str | None = field(default=None, repr=False)
    queue: int = 100
    parallel: int = 1
    min_free: int = MIN_FREE


def _integral(value: Any) -> Any:
    """JSON has one kind of numbers: 5.0 is an integer, and neither "5" nor true is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integral = pydantic.BeforeValidator(_integral)


class Submission(pydantic.BaseModel):
    """A job to be run. Names stand for what the operator allowed; there are no paths and no addresses."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"run": "demo", "features": "random:10", "llm": None, "n_test": 8, "budget_usd": 1.5}
            ]
        },
    )

    run: str = pydantic.Field(pattern=_NAME, description="Name of a run folder (GET /api/runs).")
    features: str = pydantic.Field(
        "random:10", min_length=1, max_length=2000, description='"0:40", "3,17", "random:20" or "alive".'
    )
    llm: str | None = pydantic.Field(
        None, pattern=_NAME, description="Name of an endpoint (GET /api/endpoints); null: the embedded model."
    )
    stages: list[Literal["explain", "simulate", "score"]] = pydantic.Field(
        ["explain", "simulate", "score"], max_length=3
    )
    explainer: Literal["one-shot", "tree", "top-tokens"] = "one-shot"
    holistic: Literal["exact", "gradient"] | None = pydantic.Field(
        None, description="Show the explainer which tokens cause the activations."
    )
    style: Literal["sentence", "rules"] = "sentence"
    rule_cap: Annotated[int, pydantic.Field(ge=1, le=10), Integral] = 5
    simulator: Literal["token-wise", "all-at-once", "prompt-logprobs", "rated", "lexical"] = "token-wise"
    simulator_model: str | None = pydantic.Field(
        None, max_length=200, description="One of the local models that are allowed."
    )
    n_test: Annotated[int, pydantic.Field(ge=1, le=100), Integral] = pydantic.Field(
        10, description="Test windows of each kind."
    )
    seed: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1), Integral] = 0
    budget_usd: float | None = pydantic.Field(None, gt=0, le=1e6)
    max_minutes: float | None = pydantic.Field(None, gt=0, le=1e5)


class Problem(pydantic.BaseModel):
    """Why a request was not done."""

    detail: str


class Feature(pydantic.BaseModel):
    """One feature of a job's results."""

    model_config = pydantic.ConfigDict(extra="allow")

    feature: int


class VisibleJson(JSONResponse):
    """JSON in which characters that steer a terminal or hide are written as JSON's own escapes; its value is
    the same.
    """

    def render(self, content: Any) -> bytes:
        """The body of an answer."""
        return _json(content).encode()


def _json(content: Any) -> str:
    return visible_json(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


class _RefusedError(Exception):
    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


_NO_ROOM = "the disk of the service is full: try again when there is room"
_HEALTH_PROBLEM: dict[int | str, dict[str, Any]] = {
    503: {"description": "The service does not start jobs any more."}
}


def _add_refusals(app: fastapi.FastAPI) -> None:
    """How errors are answered: by one sentence each."""

    @app.exception_handler(_RefusedError)
    async def refused(_: fastapi.Request, error: _RefusedError) -> VisibleJson:
        return VisibleJson({"detail": error.detail}, error.status, error.headers)

    @app.exception_handler(FeatureInterpError)
    async def failed(_: fastapi.Request, error: FeatureInterpError) -> VisibleJson:
        if says_full(error):
            return VisibleJson({"detail": _NO_ROOM}, 503, {"Retry-After": "60"})
        states: dict[type[FeatureInterpError], int] = {
            UnknownNameError: 404,
            WrongStateError: 409,
            DamagedJobError: 409,
            QueueFullError: 429,
        }
        status = next((code for kind, code in states.items() if isinstance(error, kind)), 422)
        return VisibleJson({"detail": str(error)}, status, {"Retry-After": "60"} if status == 429 else None)

    @app.exception_handler(OSError)
    async def unable(_: fastapi.Request, error: OSError) -> VisibleJson:
        _log.error("a request could not be answered", exc_info=error)
        why = "has too much to do" if error.errno in PASSING else f"cannot use its folder ({error.strerror})"
        return VisibleJson({"detail": f"the service {why}: try again later"}, 503, {"Retry-After": "5"})

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def mistaken(_: fastapi.Request, error: fastapi.exceptions.RequestValidationError) -> VisibleJson:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"][1:])[:_SHOWN] or "the body"
        return VisibleJson({"detail": f"{place}: {first['msg'].removeprefix('Value error, ')}"}, 422)


def _problems(*codes: int, json_only: bool = True) -> dict[int | str, dict[str, Any]]:
    """What may go wrong, for the interface's description. ``json_only`` False: the answer itself is no JSON,
    but these are.
    """
    words = {
        400: "The request is no request.",
        401: "The token is missing or wrong.",
        403: "The request comes from a page of another site.",
        404: "There is nothing of that name.",
        405: "The path takes another method.",
        409: "The job is not in a state for that.",
        413: "The body is too large.",
        422: "The request has a mistake; the detail names it.",
        429: "The queue is full.",
        503: "The disk is full, or the service has too much to do.",
    }
    form: dict[str, Any] = {"model": Problem}
    if not json_only:
        form = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    return {code: {**form, "description": words[code]} for code in (400, 401, 403, *codes, 503)}


def _whole(text: Any) -> Any:
    """A number in a path or a query is written as in JSON: without spaces, signs, separators or digits of
    other scripts.
    """
    if isinstance(text, str) and not re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text, re.ASCII):
        raise ValueError("write an integer, such as 10")
    return text


JobId = Annotated[
    str, fastapi.Path(description="The job's id.", max_length=80, examples=["20260101-120000-0123abcd"])
]
Whole = pydantic.BeforeValidator(_whole)
Limit = Annotated[int, pydantic.Field(ge=1, le=1000), Whole, fastapi.Query(description="At most so many.")]
Offset = Annotated[
    int, pydantic.Field(ge=0, le=10**9), Whole, fastapi.Query(description="Leave out so many first.")
]
FeatureIndex = Annotated[int, pydantic.Field(ge=0, le=2**40), Whole, fastapi.Path()]


def make_app(rules: Rules) -> fastapi.FastAPI:
    """The service for an operator's rules. Its workers go on when it ends."""
    jobs = JobsFolder(rules.jobs)
    runner = Runner(jobs, parallel=rules.parallel, min_free=rules.min_free)

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        await runner.once()
        async with anyio.create_task_group() as group:
            group.start_soon(runner.serve)
            yield
            group.cancel_scope.cancel()

    app = fastapi.FastAPI(
        title="featureinterp",
        version=__version__,
        summary="Jobs that explain features of sparse autoencoders and test the explanations.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        default_response_class=VisibleJson,
    )
    app.add_middleware(Gate, token=rules.token)

    _add_refusals(app)

    @app.get(
        "/health",
        tags=["service"],
        summary="Does the service do its work? Needs no token.",
        responses=_HEALTH_PROBLEM,
    )
    async def health() -> VisibleJson:
        found = health_of(runner, rules.queue)
        return VisibleJson(
            {"status": found.status, "version": __version__, **found.facts}, 200 if found.alive else 503
        )

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def front() -> HTMLResponse:
        views = await anyio.to_thread.run_sync(jobs.views, PAGE)
        page = await anyio.to_thread.run_sync(front_page, views)
        return HTMLResponse(page, headers=_HEADERS)

    @app.get(
        "/api/runs",
        tags=["service"],
        summary="Names of the runs that can be explained",
        responses=_problems(),
    )
    async def runs() -> list[str]:
        return await anyio.to_thread.run_sync(_runs, rules)

    @app.get(
        "/api/endpoints",
        tags=["service"],
        summary="Names of the endpoints that can be asked",
        responses=_problems(),
    )
    async def endpoints() -> list[str]:
        return list(rules.endpoints)

    @app.post(
        "/api/jobs",
        status_code=201,
        tags=["jobs"],
        summary="Submit a job",
        responses=_problems(404, 413, 422, 429),
    )
    async def submit(submission: Submission) -> JobView:
        view = await anyio.to_thread.run_sync(_submit, submission, rules, jobs)
        await runner.tell()
        return view

    @app.get("/api/jobs", tags=["jobs"], summary="All jobs, the newest first", responses=_problems(422))
    async def listed(limit: Limit = PAGE, offset: Offset = 0) -> list[JobView]:
        return await anyio.to_thread.run_sync(lambda: jobs.views(limit, skip=offset))

    @app.get("/api/jobs/{job_id}", tags=["jobs"], summary="One job", responses=_problems(404, 422))
    async def one(job_id: JobId) -> JobView:
        return await anyio.to_thread.run_sync(jobs.view, job_id)

    @app.get(
        "/api/jobs/{job_id}/events",
        tags=["jobs"],
        summary="Watch a job: server-sent events, one whenever it changes, until it has ended",
        response_class=StreamingResponse,
        responses={
            200: {
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
                "description": "Events named job, each a job as JSON.",
            },
            **_problems(404, 422, json_only=False),
        },
    )
    async def events(job_id: JobId) -> StreamingResponse:
        await anyio.to_thread.run_sync(jobs.path, job_id)

        async def stream() -> AsyncIterator[str]:
            async for view in runner.watch(job_id):
                yield ": no news\n\n" if view is None else f"event: job\ndata: {_json(view.to_json())}\n\n"

        return StreamingResponse(
            stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @app.post(
        "/api/jobs/{job_id}/cancel",
        tags=["jobs"],
        summary="Ask a job to end; what is finished is kept",
        responses=_problems(404, 409, 422),
    )
    async def cancel(job_id: JobId) -> JobView:
        return await runner.cancel(job_id)

    @app.post(
        "/api/jobs/{job_id}/resume",
        tags=["jobs"],
        summary="Let a job that ended before it was through go on",
        responses=_problems(404, 409, 422, 429),
    )
    async def resume(job_id: JobId) -> JobView:
        await anyio.to_thread.run_sync(_check_room, rules)
        return await runner.resume(job_id, queue=rules.queue)

    @app.get(
        "/api/jobs/{job_id}/results",
        tags=["results"],
        summary="Features of a job, without their windows",
        responses=_problems(404, 422),
    )
    async def results(job_id: JobId, limit: Limit = PAGE, offset: Offset = 0) -> list[Feature]:
        found = await anyio.to_thread.run_sync(_results, jobs, job_id, offset, offset + limit)
        return [Feature(**{k: v for k, v in row.items() if k != "windows"}) for row in found]

    @app.get(
        "/api/jobs/{job_id}/features/{feature}",
        tags=["results"],
        summary="One feature, with its windows",
        responses=_problems(404, 422),
    )
    async def feature(job_id: JobId, feature: FeatureIndex) -> Feature:
        found = await anyio.to_thread.run_sync(_feature, jobs, job_id, feature)
        return Feature(**found)

    @app.get(
        "/api/jobs/{job_id}/report",
        tags=["results"],
        summary="The report: one self-contained HTML page",
        response_class=HTMLResponse,
        responses=_problems(404, 422, json_only=False),
    )
    async def report(job_id: JobId) -> FileResponse:
        path = await anyio.to_thread.run_sync(jobs.path, job_id) / "out" / "report.html"
        if not path.is_file():
            raise _RefusedError(404, f"the job {job_id} has no report yet")
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=_HEADERS)

    return app


def _runs(rules: Rules) -> list[str]:
    if not rules.runs.is_dir():
        return []
    return sorted(p.name for p in rules.runs.iterdir() if (p / "codes" / "codes.json").is_file())


def _check_room(rules: Rules) -> None:
    if not room(rules.jobs, rules.min_free).enough:
        raise _RefusedError(503, _NO_ROOM, {"Retry-After": "60"})


def _submit(submission: Submission, rules: Rules, jobs: JobsFolder) -> JobView:
    from featureinterp import api
    from featureinterp.jobs.records import parse_features
    from featureinterp.jobs.spec import make_job

    if submission.run not in _runs(rules):
        raise UnknownNameError(f"there is no run {submission.run!r}: GET /api/runs lists them")
    if submission.llm is not None and submission.llm not in rules.endpoints:
        raise UnknownNameError(f"there is no endpoint {submission.llm!r}: GET /api/endpoints lists them")
    model = submission.simulator_model or rules.simulator_models[0]
    if model not in rules.simulator_models:
        raise UnknownNameError(
            f"the simulator {model[:60]!r} is not allowed: choose from {', '.join(rules.simulator_models)}"
        )
    _check_room(rules)
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


def _results(jobs: JobsFolder, number: str, start: int, end: int) -> list[dict[str, Any]]:
    return list(islice(_rows(jobs, number), start, end))


def _rows(jobs: JobsFolder, number: str) -> Iterator[dict[str, Any]]:
    """The results of a job one by one. Raises ``DamagedJobError`` at the first that is not what was
    written.
    """
    path = jobs.path(number) / "out" / "results.jsonl"
    if not path.is_file():
        return
    again = "resume the job to write it anew from the journal"
    try:
        with _lines(path, again) as lines:
            for i, line in enumerate(lines):
                yield _row(number, i, line)
    except DamagedStoreError as error:
        if is_locked(path.parent.parent):
            raise WrongStateError(
                f"the results of the job {number} are being written: ask again in a second"
            ) from error
        raise DamagedJobError(str(error).replace(str(path.parent) + "/", "")) from error


@contextmanager
def _lines(path: Path, remedy: str) -> Iterator[Iterator[bytes]]:
    """The lines of results, checked by their blocks where ``about.json`` has checksums of them."""
    about = path.parent / "about.json"
    files = read_marker(about, remedy).files if about.is_file() else None
    if files is not None and path.name in files:
        yield checked_lines(path, files[path.name], remedy)
        return
    with path.open("rb") as file:
        yield iter(lambda: file.readline(MAX_LINE), b"")


def _row(number: str, i: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or type(row.get("feature")) is not int:
        again = "resume the job to write it anew from the journal"
        raise DamagedJobError(f"results.jsonl of the job {number} is damaged in line {i + 1}: {again}")
    return row


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _feature(jobs: JobsFolder, number: str, index: int) -> dict[str, Any]:
    for row in _rows(jobs, number):
        if row["feature"] == index:
            return row
    raise UnknownNameError(f"the job {number} has no results of feature {index}")
