"""A transformers model as language model and as reader of prompts, against the library itself and against the
local simulator.
"""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from endpoint import endpoint
from test_simulate import RULES, WINDOWS
from tiny import make_model, tokenizer

import featureinterp as fi
from featureinterp.domain.chat import Message, Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, InputError, MalformedReplyError, RequestRefusedError
from featureinterp.jobs.records import alive_features
from featureinterp.llm.config import LOCAL
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.openai import OpenAIModel
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.chat import LocalModel
from featureinterp.local.prefix_cache import PrefixModel, shared_tokens
from featureinterp.simulators.prompt_logprobs import PromptLogprobs, expected_level
from featureinterp.tasks import each

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ASK = (Message("system", "s"), Message("user", "The army marched"))


def parts(family: str = "llama", template: str | None = TEMPLATE) -> tuple[Any, Any]:
    tok = tokenizer()
    tok.chat_template = template
    return make_model(family), tok


def ask(model: LocalModel, request: Request) -> Reply:
    return anyio.run(model.complete, request)


def test_greedy_generation_is_the_model_s_own_argmax():
    loaded = parts()
    model, tok = loaded
    reply = ask(LocalModel(lambda: loaded, name="tiny"), Request(ASK, 6, top_logprobs=4))
    ids = tok.encode("system: s\nuser: The army marched\nassistant:", add_special_tokens=False)
    start = len(ids)
    first = None
    with torch.no_grad():
        for _ in range(6):
            logits = model(torch.tensor([ids])).logits[0, -1]
            first = torch.log_softmax(logits, -1) if first is None else first
            ids.append(int(logits.argmax()))
            if ids[-1] == tok.eos_token_id:
                break
    whole = ids[-1] == tok.eos_token_id
    assert reply.texts == (
        tok.decode(ids[start : -1 if whole else None], skip_special_tokens=True),
    ) and reply.truncated == (not whole,)
    assert (
        reply.usage.prompt_tokens == start
        and reply.usage.completion_tokens == len(ids) - start
        and reply.usage.cost_usd == 0
    )
    values, places = first.topk(4)
    expected: dict[str, float] = {}
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        expected.setdefault(tok.decode([place]), value)  # halves of characters decode alike
    assert reply.first_token[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}, {"min_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_s_own_settings_change_no_probability(settings: dict[str, Any], temperature: float):
    loaded = parts()
    request = Request(ASK, 12, temperature=temperature, seed=3, top_logprobs=4)
    as_it_is = ask(LocalModel(lambda: loaded, name="tiny"), request)
    for name, value in settings.items():
        setattr(loaded[0].generation_config, name, value)
    again = ask(LocalModel(lambda: loaded, name="tiny"), request)
    assert again.texts == as_it_is.texts and again.tokens == as_it_is.tokens


def test_sampling_is_reproducible_and_gives_as_many_choices_as_asked():
    loaded = parts()
    model = LocalModel(lambda: loaded, name="tiny")
    one, two, other = (ask(model, Request(ASK, 12, 1.0, seed, n=3)) for seed in (1, 1, 2))
    assert one.texts == two.texts and len(one.texts) == 3 and other.texts != one.texts


def test_a_stop_ends_a_reply():
    loaded = parts()
    model = LocalModel(lambda: loaded, name="tiny")
    whole = ask(model, Request(ASK, 24)).text
    stop = whole[3:5]
    reply = ask(model, Request(ASK, 24, stop=(stop,)))
    assert reply.text == whole[: whole.index(stop)] and reply.truncated == (False,)


def test_what_cannot_be_answered():
    loaded = parts(template=None)
    with pytest.raises(InputError, match="chat template"):
        ask(LocalModel(lambda: loaded, name="tiny"), Request(ASK))
    loaded = parts()
    with pytest.raises(RequestRefusedError, match="do not fit"):
        ask(LocalModel(lambda: loaded, name="tiny"), Request((Message("user", "word " * 5000),)))


def questions(n: int, **settings: Any) -> list[Request]:
    return [
        Request((*ASK, Message("user", f"the army of {'many ' * i}men")), 4, top_logprobs=5, **settings)
        for i in range(n)
    ]


def ask_all(model: LocalModel, requests: list[Request]) -> list[Reply]:
    return anyio.run(each, model.complete, requests)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("known", [True, False])
def test_short_answers_in_one_pass_are_those_of_one_at_a_time(family: str, known: bool):
    loaded = parts(family)
    alone = [ask(LocalModel(lambda: loaded, name="tiny"), request) for request in questions(9)]
    answers = (
        tuple(tok_text for reply in alone for tok_text in reply.first_token[0])
        if known
        else ("none of its words",)
    )
    together = ask_all(LocalModel(lambda: loaded, name="tiny"), questions(9, answers=answers))
    for one, other in zip(alone, together, strict=True):
        assert other.first_token[0] == pytest.approx(one.first_token[0], abs=1e-4)
        assert other.usage.prompt_tokens == one.usage.prompt_tokens
        if known:  # it ends with its first token
            assert (
                other.text == max(one.first_token[0], key=one.first_token[0].__getitem__)
                and other.truncated == (False,)
                and other.usage.completion_tokens == 1
            )
        else:
            assert other.text == one.text and other.truncated == one.truncated


def test_what_questions_have_in_common_is_read_once(monkeypatch: pytest.MonkeyPatch):
    loaded = parts()
    model, read = LocalModel(lambda: loaded, name="tiny"), []
    prefix, hidden = PrefixModel.prefix, PrefixModel.hidden
    monkeypatch.setattr(
        PrefixModel,
        "prefix",
        lambda self, ids, before=None: read.append(len(ids)) or prefix(self, ids, before),
    )
    monkeypatch.setattr(
        PrefixModel, "hidden", lambda self, before, ids: read.append(ids.numel()) or hidden(self, before, ids)
    )
    asked = [
        Request((*ASK, Message("user", f"the army of men {i}")), 1, top_logprobs=5, answers=("x",))
        for i in range(8)
    ]
    ids = [model._ids(request) for request in asked]
    common = len(shared_tokens(ids))
    ask(model, asked[0])
    whole = sum(read)
    assert common > 10 and whole >= len(ids[0])
    ask_all(model, asked)
    assert sum(read) - whole <= 8 * (max(map(len, ids)) - common)


def test_a_question_that_fails_or_is_cancelled_takes_no_other_with_it():
    loaded = parts()
    model = LocalModel(lambda: loaded, name="tiny")
    long = Request((Message("user", "word " * 5000),), 4, top_logprobs=5, answers=("Yes",))
    got: dict[int, object] = {}

    async def one(index: int, request: Request) -> None:
        try:
            got[index] = await model.complete(request)
        except RequestRefusedError as error:
            got[index] = error

    async def go() -> None:
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as first:
                    first.start_soon(one, 0, questions(1, answers=("x",))[0])
                    for index, request in enumerate([long, *questions(5, answers=("x",))], 1):
                        group.start_soon(one, index, request)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()

    anyio.run(go)
    assert (
        isinstance(got.pop(1), RequestRefusedError)
        and set(got) >= {2, 3, 4, 5, 6}
        and all(isinstance(r, Reply) for r in got.values())
    )


def test_the_event_loop_goes_on_while_the_model_computes():
    gate = threading.Event()
    loaded = parts()

    def load() -> tuple[Any, Any]:
        assert gate.wait(30)
        return loaded

    async def go() -> bool:
        async with anyio.create_task_group() as group:
            group.start_soon(LocalModel(load, name="tiny").complete, Request(ASK, 2))
            await anyio.wait_all_tasks_blocked()
            gate.set()
        return True

    assert anyio.run(go)


def test_a_simulator_and_a_language_model_on_one_model_do_not_disturb_each_other():
    loaded = parts()
    request, question = Request(ASK, 4, top_logprobs=4), questions(1, answers=("x",))[0]
    simulator = AllAtOnce(lambda: loaded, name="tiny", dtype="float32")
    text, answer = (ask(LocalModel(lambda: loaded, name="tiny"), r) for r in (request, question))
    levels = simulator.predict(RULES, WINDOWS)
    model = LocalModel(lambda: loaded, name="tiny")

    async def go() -> None:
        async def simulated() -> None:
            for found, known in zip(await simulator.simulate(RULES, WINDOWS), levels, strict=True):
                np.testing.assert_allclose(found.expected, known.expected, atol=1e-5)

        async def asked(request: Request, known: Reply) -> None:
            reply = await model.complete(request)
            assert reply.texts == known.texts and reply.first_token[0] == pytest.approx(
                known.first_token[0], abs=1e-4
            )

        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(simulated)
                group.start_soon(asked, request, text)
                group.start_soon(asked, question, answer)

    anyio.run(go)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reading_prompts_gives_what_the_local_simulator_computes(family: str):
    model, tok = parts(family)
    local = AllAtOnce(lambda: (model, tok), name="tiny", dtype="float32").predict(RULES, WINDOWS)
    reader = LocalModel(lambda: (model, tok), name="tiny")

    class All(FunctionModel):
        """Returns every token's probability, as an endpoint without a bound on alternatives would."""

        async def complete(self, request: Request) -> Reply:
            return await reader.complete(replace(request, top_logprobs=10**6))

    read = anyio.run(PromptLogprobs(All(lambda _: ""), lambda: tok).simulate, RULES, WINDOWS)
    for a, b in zip(local, read, strict=True):
        assert a.expected is not None and b.expected is not None
        np.testing.assert_allclose(a.expected, b.expected, atol=1e-4)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_reading_over_http_in_either_form(way: str):
    model, tok = parts()
    local = AllAtOnce(lambda: (model, tok), name="tiny", dtype="float32").predict(RULES, WINDOWS[:2])

    def answer(body: dict[str, Any]) -> Any:
        if ("prompt_logprobs" in body) != (way == "prompt_logprobs"):
            return 400, {}, {"error": {"message": "unknown field"}}
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([body["prompt"]])).logits[0], -1)
        levels = {text: tok.encode(text)[0] for text in "012345"}
        rows: list[Any] = [None]
        for row in table[:-1].tolist():
            pairs = [(text, token, row[token]) for text, token in levels.items()]
            if way == "prompt_logprobs":
                rows.append(
                    {str(token): {"logprob": p, "rank": 1, "decoded_token": text} for text, token, p in pairs}
                )
            else:
                rows.append({text: p for text, _, p in pairs})
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        if way == "echo":
            choice["logprobs"] = {
                "tokens": ["t"] * len(rows),
                "token_logprobs": [None] * len(rows),
                "top_logprobs": rows,
                "text_offset": [0] * len(rows),
            }
        else:
            choice["prompt_logprobs"] = rows
        return {
            "id": "x",
            "object": "text_completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }

    async def go(url: str) -> Any:
        endpoint_model = OpenAIModel(url, "m", api_key_env=None)
        try:
            return await PromptLogprobs(endpoint_model, lambda: tok).simulate(RULES, WINDOWS[:2])
        finally:
            await endpoint_model.aclose()

    with endpoint(answer) as server:
        read = anyio.run(go, server.url)
    for a, b in zip(local, read, strict=True):
        np.testing.assert_allclose(a.expected, b.expected, atol=1e-4)


def test_levels_that_are_not_among_the_alternatives():
    assert expected_level({"5": 0.0}) == 5 and expected_level({"0": -1.0, "4": -1.0, "x": 0.0}) == 2
    assert expected_level({"0": np.log(0.9), "5": np.log(0.1)}, 0.5) == pytest.approx(5 * 0.01 / 0.82)
    with pytest.raises(MalformedReplyError, match="larger model"):
        expected_level({"x": -0.1})
    tok = tokenizer()
    none = FunctionModel(lambda r: Reply(("",), (False,), Usage(1), ({},), ({"x": -0.1},) * len(r.read_at)))
    found = anyio.run(PromptLogprobs(none, lambda: tok).simulate, RULES, WINDOWS[:2])
    assert all(s.expected is None and "larger model" in str(s.failure) for s in found)

    def refuse(_: Request) -> str:
        raise EndpointRefusedError("no such thing")

    with pytest.raises(EndpointRefusedError):
        anyio.run(PromptLogprobs(FunctionModel(refuse), lambda: tok).simulate, RULES, WINDOWS[:1])


def judge_folder(folder: Path) -> str:
    """A chat model that says Yes or No to everything: by the sign of a random direction of what it read."""
    model, tok = parts()
    tok.add_tokens(["Yes", "No"])
    yes, no = tok.convert_tokens_to_ids(["Yes", "No"])
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[yes], model.lm_head.weight[no] = 4 * direction, -4 * direction
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def probabilities(out: Path) -> set[str]:
    """What the journal holds of detection, each answer of a question with its probability."""
    rows = sqlite3.connect(out / "journal.sqlite").execute(
        "SELECT value, provenance FROM results WHERE stage = 'detection'"
    )
    return {f"{value} {provenance}" for value, provenance in rows}


def test_a_judge_of_this_process_is_asked_anew_in_another_dtype(run: Path, tmp_path: Path):
    """In the same folder as in one of its own; and what was asked in each is known in each."""
    judge, features = judge_folder(tmp_path / "judge"), alive_features(fi.open_run(run))[:2]

    def job(out: str, dtype: str) -> fi.Job:
        return fi.Job(
            run=run,
            out=tmp_path / out,
            features=tuple(map(int, features)),
            llm=fi.Endpoint(LOCAL, judge),
            explainer="top-tokens",
            simulator="lexical",
            stages=("explain", "score"),
            simulator_dtype=dtype,
            simulator_device="cpu",
            plan=fi.Plan(n_test=2, n_valid=2, negatives=("random",), fuzzing=False, complexity=False),
            records=fi.RecordPolicy({"top": (4, 2, 2), "random": (0, 2, 2)}),
        )

    results = fi.run(job("both", "float32"))
    assert results.n_failures == 0 and {s.name for r in results for s in r.scores} > {"detection_auroc"}
    first = probabilities(tmp_path / "both")
    assert fi.dry_run(job("both", "bfloat16")).left == 2 and fi.dry_run(job("both", "float32")).left == 0
    fi.run(job("both", "bfloat16"))
    fi.run(job("alone", "bfloat16"))
    alone = probabilities(tmp_path / "alone")
    assert first and alone and not first & alone, "both answer, and otherwise"
    assert probabilities(tmp_path / "both") == first | alone
    assert all("float32)" in row for row in first) and all("bfloat16)" in row for row in alone)
    assert fi.dry_run(job("both", "bfloat16")).left == fi.dry_run(job("both", "float32")).left == 0
