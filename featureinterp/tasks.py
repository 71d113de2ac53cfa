"""Several pieces of work at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

Item = TypeVar("Item")
Result = TypeVar("Result")


async def each(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """``work`` on every item, all at once; the results in the order of the items.

    After an error no further work begins, what is under way is let finish (it may be paid for), and the first error is raised as it is.
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
