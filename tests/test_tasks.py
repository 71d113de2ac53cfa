"""Turns, by the order of steps."""

from __future__ import annotations

import anyio
from anyio.lowlevel import checkpoint

from featureinterp.tasks import Turns


def order(turns: Turns | None) -> list[str]:
    """What six tasks that begin together do: a step, and another one, with a rest of the event loop between
    them.
    """
    seen: list[str] = []

    async def one(name: str) -> None:
        if turns is not None:
            await turns.take()
        seen.append(f"{name} prepares")
        await checkpoint()
        seen.append(f"{name} writes")

    async def go() -> None:
        async with anyio.create_task_group() as group:
            for name in "abcdef":
                group.start_soon(one, name)

    anyio.run(go)
    return seen


def test_each_goes_on_alone_until_it_has_written():
    assert order(Turns()) == [f"{name} {what}" for name in "abcdef" for what in ("prepares", "writes")]
    assert order(None)[1] == "b prepares"  # without turns all prepare before the first writes


def test_a_cancelled_wait_leaves_the_turn_to_the_others():
    async def go() -> list[str]:
        turns, seen = Turns(), []

        async def one(name: str) -> None:
            await turns.take()
            seen.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(one, "a")
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(one, "b")
                    inner.start_soon(one, "c")
                    scope.cancel()
            group.start_soon(one, "d")
        return seen

    assert anyio.run(go)[-1] == "d"
