"""Several pieces of work at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

Item = TypeVar("Item")
Result = TypeVar("Result")


async def each(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """``work`` on every item, all at once; the results in the order of the items.

    After an error no further work begins, what is under way is let finish (it may be paid for), and the first
    error is raised as it is.
    """
    results: dict[int, Result] = {}
    errors: list[Exception] = []

    async def one(number: int, item: Item) -> None:
        if errors:
            return
        try:
            results[number] = await work(item)
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for number, item in enumerate(items):
            group.start_soon(one, number, item)
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(results))]


class Turns:
    """Tasks that reach ``take`` at the same time go on one after the other.

    An event loop gives every ready task one step, then all of them their next: of many requests that are
    prepared together even the first is written only after nearly all work for the last. So each goes on alone
    for ``STEPS`` steps, in which a request is written.
    """

    STEPS = 2

    def __init__(self) -> None:
        self._turn = anyio.Semaphore(1, max_value=1, fast_acquire=True)

    async def take(self) -> None:
        """Waits for the turn, which ends by itself."""
        await self._turn.acquire()
        self._step(self.STEPS)

    def _step(self, left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(self._step, left - 1)
        else:
            self._turn.release()
