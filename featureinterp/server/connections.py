"""Connections with an end: a request must arrive within seconds, an answer must be read, and there are never
more than descriptors allow."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 5.0
"""A request has arrived whole within so long, head and body, or its connection is closed."""
ANSWER_S = 60.0
"""Whoever reads nothing of an answer for so long is cut off."""
MOST = 1000
OWN = 192
"""Descriptors that connections leave to the service for its files, workers, and the connections that it turns
away.
"""


def allowed_connections(*, hard_limit_wanted: int = 8192) -> int:
    """How many connections there may be at once. Asks the system for more descriptors where that is
    allowed.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard_limit_wanted if hard == resource.RLIM_INFINITY else min(hard, hard_limit_wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = math.inf if soft == resource.RLIM_INFINITY else soft
    return int(max(16, min(MOST, most - OWN)))


BEYOND = 64
"""So many connections beyond the limit may say that they only ask for ``/health``; the one that has said
nothing for longest goes first.
"""
_HEALTH = re.compile(rb"(GET|HEAD) /health(\?[^ ]*)? HTTP/1\.[01]\r?\n")
_FIRST_LINE = 256


class Bounded(H11Protocol):
    """uvicorn's protocol with bounds. ``most``: connections at once. ``request_s``: how long a request may
    take to arrive.

    Beyond ``most`` a connection is answered when it asks for ``/health``, and turned away when it asks for
    anything else. ``_beyond``: those connections, the oldest first.
    """

    most = MOST
    request_s = REQUEST_S
    _beyond: ClassVar[dict[Bounded, None]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # its only one
        """Takes a connection, or turns it away at once when there are too many."""
        self._until: asyncio.TimerHandle | None = None
        self._reading_until: asyncio.TimerHandle | None = None
        self._first: bytes | None = None
        super().connection_made(transport)
        if len(self.connections) - len(self._beyond) > self.most:
            self._first = b""
            self._beyond[self] = None
            if len(self._beyond) > BEYOND:
                next(iter(self._beyond))._turn_away()
        self._expect()

    def _turn_away(self) -> None:
        self._forget()
        if self._first is None:  # its answer is under way
            self.transport.abort()
        else:
            self._refuse(503, "there are too many connections: try again in some seconds")
        self._beyond.pop(self, None)

    def _heard(self, data: bytes) -> bytes | None:
        """What a connection beyond the limit has sent, when it is answered after all; None: not yet, or it
        was turned away.
        """
        self._first = first = (self._first or b"") + data
        if b"\n" not in first and len(first) <= _FIRST_LINE:
            return None
        if not _HEALTH.match(first):
            if len(self.connections) - len(self._beyond) >= self.most:
                self._turn_away()
                return None
            self._beyond.pop(self, None)  # others have gone meanwhile
        self._first = None
        return first

    def data_received(self, data: bytes) -> None:
        """Takes what arrives; the clock of a request runs from its first byte to its last."""
        if self.transport.is_closing():
            return
        if self._first is not None:
            whole = self._heard(data)
            if whole is None:
                return
            data = whole
        super().data_received(data)
        if self._is_whole():
            self._forget()
        else:
            self._expect()

    def on_response_complete(self) -> None:
        """Goes on with what has arrived meanwhile."""
        if self in self._beyond:  # one answer, and no more
            self.transport.close()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0] and not self._is_whole():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._forget()
        self._beyond.pop(self, None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The other side does not read: it has to, in time."""
        super().pause_writing()
        self._reading_until = self.loop.call_later(ANSWER_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The other side has read."""
        super().resume_writing()
        if self._reading_until is not None:
            self._reading_until.cancel()
            self._reading_until = None

    def _is_whole(self) -> bool:
        """Whether the request that is being dealt with has arrived to its end."""
        return self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)

    def _expect(self) -> None:
        if self._until is None:
            self._until = self.loop.call_later(self.request_s, self._cut)

    def _forget(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _cut(self) -> None:
        self._until = None
        if self._first is not None:
            self._turn_away()
        elif self.conn.our_state is h11.IDLE or (self.cycle is not None and not self.cycle.response_started):
            self._refuse(408, f"the request did not arrive within {self.request_s:g} s")
        else:
            self.transport.abort()

    def _refuse(self, status: int, why: str) -> None:
        """Answers and closes, whatever else was under way."""
        body = json.dumps({"detail": why}).encode()
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
        lines = (
            f"HTTP/1.1 {status} {reason}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Retry-After: 5",
            "Connection: close",
        )
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()


def bounded(most: int, request_s: float = REQUEST_S) -> type[Any]:
    """The protocol for at most ``most`` connections, whose requests arrive within ``request_s`` seconds."""
    return type("BoundedTo", (Bounded,), {"most": most, "request_s": request_s, "_beyond": {}})
