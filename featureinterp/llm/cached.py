"""Answers that were paid for once: on disk, by the content of the request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from featureinterp.domain.chat import Reply, Request
from featureinterp.errors import LanguageModelError
from featureinterp.files import content_key, parse_json
from featureinterp.interfaces import LanguageModel
from featureinterp.stored.sums import described
from featureinterp.stored.tables import Table, Tables

VERSION, READS = 1, (0,)
TABLES = {
    "replies": Table(
        "key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, created REAL NOT NULL",
        ("key", "model", "created"),
        ("reply",),
    )
}
_REMEDY = "restore it from a copy, or delete it to ask the model again"


class ReplyStore:
    """A SQLite file of replies. Table ``replies``: ``key`` (hash of endpoint, model and everything in the
    request that can change the answer), ``model``, ``reply`` (JSON), ``created`` (Unix seconds). A reply is
    on disk before it is used. ``path`` None: kept in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._tables = Tables(
            path or ":memory:", TABLES, "the cache of replies", version=VERSION, reads=READS, remedy=_REMEDY
        )

    def check(self) -> int:
        """Raises ``DamagedStoreError`` when anything in the file is not what was written. How many rows have
        no checksum.
        """
        return self._tables.check()

    def get(self, key: str) -> Reply | None:
        """The reply under a key."""
        for row in self._tables.rows("replies", "WHERE key = ?", (key,)):
            with described(self.path or Path(), _REMEDY):
                return Reply.from_json(parse_json(row["reply"]))
        return None

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Keeps a reply."""
        row = {"key": key, "model": model, "reply": json.dumps(reply.to_json(), ensure_ascii=False)}
        self._tables.put("replies", row | {"created": time.time()})

    def close(self) -> None:
        """Closes the file."""
        self._tables.close()


@dataclass(slots=True)
class _Pending:
    done: anyio.Event
    reply: Reply | None = None
    error: LanguageModelError | None = None


class Cached:
    """Asks ``model`` only what it has not answered before. Equal requests at the same time are one request.

    ``identity`` is what beside the request determines the answer: the endpoint's address and its own
    parameters. A reply that the request's ``check`` refuses is passed on. It settles the request, too, when
    asking again would be paid for and end in the same way (at temperature 0, with a seed, refused by the
    model or a filter, or cut): it is kept, and with ``retry_failed`` asked for once more. A reply that was
    cut, and is no answer, is asked again once there is more ``room`` for it. The usage of a kept reply is
    what it cost when it was new.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: ReplyStore,
        *,
        identity: Any = None,
        room: Callable[[Request], int] = lambda request: request.max_tokens,
        retry_failed: bool = False,
    ) -> None:
        self.name = model.name
        self.hits = 0
        self._room = room
        self._model, self._store, self._identity = model, store, identity
        self._pending: dict[str, _Pending] = {}
        self._retry_failed, self._asked = retry_failed, set[str]()

    def key(self, request: Request) -> str:
        """The content key of a request."""
        asked = [
            [[m.role, m.content] for m in request.messages],
            [request.max_tokens, request.temperature, request.seed, request.n, request.top_logprobs],
            request.stop,
            request.schema,
            request.prompt,
            request.read_at,
        ]
        return content_key([self._identity, self.name, asked])

    async def complete(self, request: Request) -> Reply:
        key = self.key(request)
        while True:
            known = self._store.get(key)
            if known is not None and self._is_settled(key, request, known):
                self.hits += 1
                return known
            pending = self._pending.get(key)
            if pending is None:
                return await self._ask(key, request)
            await pending.done.wait()
            if pending.error is not None:
                raise pending.error
            if pending.reply is not None:
                return pending.reply

    def _is_settled(self, key: str, request: Request, known: Reply) -> bool:
        """Whether a kept reply is taken for the answer."""
        if any(known.truncated) and 0 < known.room < self._room(request) and not is_answer(request, known):
            return False
        if not self._retry_failed or key in self._asked:
            return True
        return known.refused is None and is_answer(request, known)

    async def _ask(self, key: str, request: Request) -> Reply:
        pending = self._pending[key] = _Pending(anyio.Event())
        try:
            reply = await self._model.complete(request)
            if self._retry_failed:
                self._asked.add(key)
            same = (
                request.temperature == 0
                or request.seed is not None
                or reply.refused is not None
                or (any(reply.truncated) and reply.room)
            )
            if same or is_answer(request, reply):
                self._store.put(key, self.name, reply)
            pending.reply = reply
            return reply
        except LanguageModelError as error:
            pending.error = error
            raise
        finally:
            del self._pending[key]
            pending.done.set()


def is_answer(request: Request, reply: Reply) -> bool:
    """Whether a reply passes the request's own check."""
    try:
        if request.check is not None:
            request.check(reply)
    except LanguageModelError:
        return False
    return True
