"""The HTTP interface: submit, list, watch and cancel jobs, read their results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import fastapi
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse

from featureinterp import __version__
from featureinterp.server.folder import JobsFolder, JobView
from featureinterp.server.forms import (
    Feature,
    FeatureIndex,
    JobId,
    Limit,
    Offset,
    Rules,
    Submission,
    VisibleJson,
    as_json,
)
from featureinterp.server.gate import Gate
from featureinterp.server.health import health_of
from featureinterp.server.page import PAGE, front_page
from featureinterp.server.refusals import HEALTH_PROBLEM, RefusedError, add_refusals, problems
from featureinterp.server.rows import feature_of, results_of
from featureinterp.server.runner import Runner
from featureinterp.server.submitting import check_room, run_names, submit_job

__all__ = ["Rules", "make_app"]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


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
    add_refusals(app)
    _add_service(app, rules, jobs, runner)
    _add_jobs(app, rules, jobs, runner)
    _add_watching(app, jobs, runner)
    _add_changes(app, rules, runner)
    _add_results(app, jobs)
    return app


def _add_service(app: fastapi.FastAPI, rules: Rules, jobs: JobsFolder, runner: Runner) -> None:
    """The service itself: its health, its page, what it can work on."""

    @app.get(
        "/health",
        tags=["service"],
        summary="Does the service do its work? Needs no token.",
        responses=HEALTH_PROBLEM,
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
        return HTMLResponse(page, headers=HEADERS)

    @app.get(
        "/api/runs",
        tags=["service"],
        summary="Names of the runs that can be explained",
        responses=problems(),
    )
    async def runs() -> list[str]:
        return await anyio.to_thread.run_sync(run_names, rules)

    @app.get(
        "/api/endpoints",
        tags=["service"],
        summary="Names of the endpoints that can be asked",
        responses=problems(),
    )
    async def endpoints() -> list[str]:
        return list(rules.endpoints)


def _add_jobs(app: fastapi.FastAPI, rules: Rules, jobs: JobsFolder, runner: Runner) -> None:
    """Jobs: submit one, list them, look at one."""

    @app.post(
        "/api/jobs",
        status_code=201,
        tags=["jobs"],
        summary="Submit a job",
        responses=problems(404, 413, 422, 429),
    )
    async def submit(submission: Submission) -> JobView:
        view = await anyio.to_thread.run_sync(submit_job, submission, rules, jobs)
        await runner.tell()
        return view

    @app.get("/api/jobs", tags=["jobs"], summary="All jobs, the newest first", responses=problems(422))
    async def listed(limit: Limit = PAGE, offset: Offset = 0) -> list[JobView]:
        return await anyio.to_thread.run_sync(lambda: jobs.views(limit, skip=offset))

    @app.get("/api/jobs/{job_id}", tags=["jobs"], summary="One job", responses=problems(404, 422))
    async def one(job_id: JobId) -> JobView:
        return await anyio.to_thread.run_sync(jobs.view, job_id)


def _add_watching(app: fastapi.FastAPI, jobs: JobsFolder, runner: Runner) -> None:
    """Events of a job."""

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
            **problems(404, 422, json_only=False),
        },
    )
    async def events(job_id: JobId) -> StreamingResponse:
        await anyio.to_thread.run_sync(jobs.path, job_id)

        async def stream() -> AsyncIterator[str]:
            async for view in runner.watch(job_id):
                yield ": no news\n\n" if view is None else f"event: job\ndata: {as_json(view.to_json())}\n\n"

        return StreamingResponse(
            stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


def _add_changes(app: fastapi.FastAPI, rules: Rules, runner: Runner) -> None:
    """Jobs are ended, and go on."""

    @app.post(
        "/api/jobs/{job_id}/cancel",
        tags=["jobs"],
        summary="Ask a job to end; what is finished is kept",
        responses=problems(404, 409, 422),
    )
    async def cancel(job_id: JobId) -> JobView:
        return await runner.cancel(job_id)

    @app.post(
        "/api/jobs/{job_id}/resume",
        tags=["jobs"],
        summary="Let a job that ended before it was through go on",
        responses=problems(404, 409, 422, 429),
    )
    async def resume(job_id: JobId) -> JobView:
        await anyio.to_thread.run_sync(check_room, rules)
        return await runner.resume(job_id, queue=rules.queue)


def _add_results(app: fastapi.FastAPI, jobs: JobsFolder) -> None:
    """What a job found."""

    @app.get(
        "/api/jobs/{job_id}/results",
        tags=["results"],
        summary="Features of a job, without their windows",
        responses=problems(404, 422),
    )
    async def results(job_id: JobId, limit: Limit = PAGE, offset: Offset = 0) -> list[Feature]:
        found = await anyio.to_thread.run_sync(results_of, jobs, job_id, offset, offset + limit)
        return [Feature(**{k: v for k, v in row.items() if k != "windows"}) for row in found]

    @app.get(
        "/api/jobs/{job_id}/features/{feature}",
        tags=["results"],
        summary="One feature, with its windows",
        responses=problems(404, 422),
    )
    async def feature(job_id: JobId, feature: FeatureIndex) -> Feature:
        found = await anyio.to_thread.run_sync(feature_of, jobs, job_id, feature)
        return Feature(**found)

    @app.get(
        "/api/jobs/{job_id}/report",
        tags=["results"],
        summary="The report: one self-contained HTML page",
        response_class=HTMLResponse,
        responses=problems(404, 422, json_only=False),
    )
    async def report(job_id: JobId) -> FileResponse:
        path = await anyio.to_thread.run_sync(jobs.path, job_id) / "out" / "report.html"
        if not path.is_file():
            raise RefusedError(404, f"the job {job_id} has no report yet")
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=HEADERS)
