"""The embedded model's server: how it starts, how many requests it gets, and how long one may take. Stand-in
commands play it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointUnavailableError
from featureinterp.llm import embedded
from featureinterp.llm.embedded import LEAST_S, LONGEST_S, PATIENCE, EmbeddedModel, Pace
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.local_server import local_server, physical_cores, slots_for

ASK = Request((Message("user", "x" * 300),), max_tokens=50)
READ_SETTINGS = "import json, sys; s = json.loads(sys.stdin.readline());"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_server_that_starts_gets_its_settings_and_ends_with_the_block():
    code = (
        READ_SETTINGS
        + "print(f\"http://127.0.0.1:1/{s['slots']}/{s['threads']}\", flush=True); print('noise'); "
        "sys.stdin.read()"
    )
    with local_server(Path("m.gguf"), slots=3, threads=5, command=python(code)) as server:
        assert server.base_url == "http://127.0.0.1:1/3/5" and server.process.poll() is None
    assert server.process.poll() == 0


def test_a_start_that_hangs_is_an_error_with_the_server_s_last_lines():
    code = (
        "import sys, time\nfor line in ('loading', 'still loading', 'waiting for a lock'): print(line, "
        "file=sys.stderr, flush=True)\ntime.sleep(600)"
    )
    said = r"m\.gguf did not start within 1 s: loading; still loading; waiting for a lock"
    hangs = local_server(Path("m.gguf"), timeout_s=1, command=python(code))
    with pytest.raises(EndpointUnavailableError, match=said), hangs:
        raise AssertionError("it did not start")


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words():
    ends = local_server(Path("m.gguf"), command=python("import sys; sys.exit('the file is no model')"))
    with pytest.raises(EndpointUnavailableError, match="did not start: the file is no model"), ends:
        raise AssertionError("it did not start")
    with (
        pytest.raises(EndpointUnavailableError, match="it printed nothing"),
        local_server(Path("m.gguf"), command=python(READ_SETTINGS)),
    ):
        raise AssertionError("it did not start")


def test_slots_follow_the_cores():
    assert [slots_for(n) for n in (1, 2, 7, 8, 15, 16, 64)] == [1, 1, 1, 2, 2, 4, 4] and physical_cores() >= 1


def reply(prompt: int, completion: int) -> Reply:
    return Reply(("x",), (False,), Usage(1, prompt, completion, 0.0, 0.0), ({},))


def test_patience_follows_the_slowest_speed_seen():
    pace = Pace()
    assert pace.limit_s(ASK) == pytest.approx(PATIENCE * (100 / 4 + 50 / 0.5))
    pace.saw(reply(100, 20), 2.0)  # 10 tokens/s written, 50 read
    assert pace.limit_s(ASK) == LEAST_S
    pace.saw(reply(100, 20), 40.0)
    assert (pace.read, pace.write) == (2.5, 0.5)
    pace.saw(reply(100, 20), 1.0)  # a quick one changes nothing
    assert pace.limit_s(ASK) == pytest.approx(PATIENCE * (100 / 2.5 + 50 / 0.5))
    pace.saw(reply(1, 1), 10_000.0)
    assert pace.limit_s(ASK) == LONGEST_S
    before = (pace.read, pace.write)
    pace.saw(reply(10, 0), 5.0)
    assert (pace.read, pace.write) == before


@pytest.mark.parametrize("slots", [1, 3])
def test_no_more_requests_are_under_way_than_slots(monkeypatch: pytest.MonkeyPatch, slots: int):
    now, most = 0, 0

    class Server(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            now -= 1
            return reply(10, 5)

    model = EmbeddedModel(slots=slots)
    monkeypatch.setattr(model, "_start", lambda: Server(lambda _: "x"))

    async def go() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(model.complete, ASK)

    anyio.run(go)
    assert most == slots and model.pace.measured


def test_a_reply_that_does_not_come_in_time_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    class Never(FunctionModel):
        async def complete(self, request: Request) -> Reply:
            await anyio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr(embedded, "LEAST_S", 0.05)
    model = EmbeddedModel(slots=1)
    model.pace = Pace(read=1e6, write=1e6, measured=True)
    monkeypatch.setattr(model, "_start", lambda: Never(lambda _: "x"))

    async def go() -> Any:
        return await model.complete(ASK)

    with pytest.raises(
        EndpointUnavailableError, match="did not answer within 0 s, 6 times what its speed so far"
    ):
        anyio.run(go)
