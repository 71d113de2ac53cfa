"""The service from Python: submit, watch and cancel jobs, fetch their results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import EndpointRefusedError, EndpointUnavailableError, InputError, UnknownNameError
from featureinterp.files import UnparsedError, parse_json
from featureinterp.server.folder import ENDED, JobView

LONGEST_PAUSE_S = 5.0


class Service:
    """A running ``featureinterp serve``. Use it as a context manager, or call :meth:`close`.

    ``token_env``: name of the environment variable that holds the token. Raises ``InputError`` when that is
    not set; every call raises ``EndpointUnavailableError`` when the service cannot be reached and
    ``EndpointRefusedError`` when it refuses the token.

        with fi.Service() as service:
            job = service.submit(run="demo", features="random:10")
            for now in service.watch(job.id):
                print(now.state, now.progress)
            results = service.results(job.id)
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8765", *, token_env: str | None = None, timeout_s: float = 30.0
    ) -> None:
        import httpx

        headers = {}
        if token_env is not None:
            token = os.environ.get(token_env)
            if not token:
                raise InputError(
                    f"the environment variable {token_env} with the service's token is not set: set it, or "
                    "leave token_env out"
                )
            headers["Authorization"] = f"Bearer {token}"
        self.url = url.rstrip("/")
        self._httpx = httpx
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def health(self) -> dict[str, Any]:
        """What ``/health`` tells of the runner, the disk and the queue; ``status`` is "ok" or "degraded"."""
        try:
            found = self._client.get("/health").json()
        except self._httpx.TransportError as error:
            raise self._unreachable(error) from error
        except ValueError:
            found = None
        if not isinstance(found, dict) or "status" not in found:
            raise EndpointUnavailableError(
                f"the service at {self.url} says nothing of its health: try again later"
            )
        return found

    def runs(self) -> list[str]:
        """Names of the runs that can be explained."""
        return list(self._get("/api/runs"))

    def endpoints(self) -> list[str]:
        """Names of the endpoints that can be asked."""
        return list(self._get("/api/endpoints"))

    def submit(self, run: str, features: str = "random:10", **settings: Any) -> JobView:
        """Submits a job; ``settings`` are the fields of ``POST /api/jobs``. Raises ``InputError`` for what
        the service does not take.
        """
        return self._view(self._ask("POST", "/api/jobs", {"run": run, "features": features, **settings}))

    def jobs(self, *, limit: int = 100, offset: int = 0) -> list[JobView]:
        """All jobs, the newest first."""
        return [self._view(j) for j in self._get("/api/jobs", limit=limit, offset=offset)]

    def job(self, number: str) -> JobView:
        """One job as it is now."""
        return self._view(self._get(f"/api/jobs/{number}"))

    def watch(self, number: str) -> Iterator[JobView]:
        """A job whenever it changes, until it has ended. A connection that breaks is made anew, after a pause
        that grows while nothing comes."""
        last: JobView | None = None
        broken = 0
        while last is None or last.state not in ENDED:
            if broken:
                time.sleep(min(0.1 * 2 ** (broken - 1), LONGEST_PAUSE_S))
            broken += 1
            try:
                with self._client.stream("GET", f"/api/jobs/{number}/events", timeout=None) as response:
                    if response.status_code != 200:
                        response.read()
                        self._raise(response)
                    for line in response.iter_lines():
                        if line.startswith("data: "):
                            last, broken = self._view(self._parsed(line[6:])), 0
                            yield last
            except self._httpx.ConnectError as error:
                raise EndpointUnavailableError(
                    f"the service at {self.url} cannot be reached: check the address and that it is up"
                ) from error
            except self._httpx.TransportError:
                continue

    def wait(self, number: str) -> JobView:
        """The job when it has ended."""
        *_, last = self.watch(number)
        return last

    def cancel(self, number: str) -> JobView:
        """Asks a job to end; what is finished is kept."""
        return self._view(self._ask("POST", f"/api/jobs/{number}/cancel"))

    def resume(self, number: str) -> JobView:
        """Lets a job that ended before it was through go on."""
        return self._view(self._ask("POST", f"/api/jobs/{number}/resume"))

    def results(self, number: str) -> list[dict[str, Any]]:
        """All features of a job, without their windows."""
        found: list[dict[str, Any]] = []
        while page := self._get(f"/api/jobs/{number}/results", limit=1000, offset=len(found)):
            found += page
        return found

    def feature(self, number: str, index: int) -> FeatureResult:
        """One feature with its windows."""
        return FeatureResult.from_json(self._get(f"/api/jobs/{number}/features/{index}"))

    def report(self, number: str) -> str:
        """The report, as HTML."""
        return str(self._send("GET", f"/api/jobs/{number}/report").text)

    def _get(self, path: str, **query: Any) -> Any:
        return self._parsed(self._send("GET", path, params=query).text)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return self._parsed(self._send(method, path, json=body).text)

    def _parsed(self, text: str) -> Any:
        try:
            return parse_json(text)
        except UnparsedError as error:
            raise self._strange(text) from error

    def _view(self, value: Any) -> JobView:
        known = {f.name for f in fields(JobView)}
        try:
            return JobView(**{k: v for k, v in value.items() if k in known})
        except (AttributeError, TypeError) as error:
            raise self._strange(str(value)) from error

    def _strange(self, text: str) -> EndpointUnavailableError:
        return EndpointUnavailableError(
            f"what answers at {self.url} is no service of featureinterp (it says {text[:60]!r}): check the "
            "address"
        )

    def _send(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._client.request(method, path, **options)
        except self._httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            self._raise(response)
        return response

    def _unreachable(self, error: Exception) -> EndpointUnavailableError:
        return EndpointUnavailableError(
            f"the service at {self.url} cannot be reached ({type(error).__name__}): check that it is up"
        )

    def _raise(self, response: Any) -> None:
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {response.status_code}"
        if response.status_code == 401:
            raise EndpointRefusedError(f"the service at {self.url} refused the token: {detail}")
        if response.status_code == 404:
            raise UnknownNameError(detail)
        if response.status_code == 429 or response.status_code >= 500:
            raise EndpointUnavailableError(detail)
        raise InputError(detail)
