"""How the service says no: every error as one sentence with its status."""

from __future__ import annotations

import logging
from typing import Any

import fastapi

from featureinterp.errors import FeatureInterpError, UnknownNameError
from featureinterp.server.disk import says_full
from featureinterp.server.folder import QueueFullError, WrongStateError
from featureinterp.server.forms import Problem, VisibleJson
from featureinterp.server.views import PASSING, DamagedJobError

_SHOWN = 300
"""So much of a mistake is repeated in the answer to it, in characters."""
_log = logging.getLogger("featureinterp.server")
NO_ROOM = "the disk of the service is full: try again when there is room"
HEALTH_PROBLEM: dict[int | str, dict[str, Any]] = {
    503: {"description": "The service does not start jobs any more."}
}


class RefusedError(Exception):
    """A request that is not done: the status of the answer, and its sentence."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def add_refusals(app: fastapi.FastAPI) -> None:
    """How errors are answered: by one sentence each."""

    @app.exception_handler(RefusedError)
    async def refused(_: fastapi.Request, error: RefusedError) -> VisibleJson:
        return VisibleJson({"detail": error.detail}, error.status, error.headers)

    @app.exception_handler(FeatureInterpError)
    async def failed(_: fastapi.Request, error: FeatureInterpError) -> VisibleJson:
        if says_full(error):
            return VisibleJson({"detail": NO_ROOM}, 503, {"Retry-After": "60"})
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


def problems(*codes: int, json_only: bool = True) -> dict[int | str, dict[str, Any]]:
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
