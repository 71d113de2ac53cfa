"""Simulators: the shared prefix changes nothing, and neither does computing six logits instead of all."""

from __future__ import annotations

import json
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from tiny import FAMILIES, NASTY, TINY_TEXTS, make_model, tokenizer

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.record import Window
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, IncompatibleError, InputError
from featureinterp.llm.function import FunctionModel
from featureinterp.local.all_at_once import AllAtOnce
from featureinterp.local.prefix_cache import PrefixModel
from featureinterp.simulators.parts import single
from featureinterp.simulators.rated import Rated

P = Provenance("test")
RULES = Explanation((Rule("months", 5), Rule("words about the sea", 2)), P)


def window(pieces: list[str]) -> Window:
    return Window(0, 0, np.arange(len(pieces)), tuple(pieces), np.zeros(len(pieces), np.float32))


def words(text: str) -> list[str]:
    return [w if i == 0 else " " + w for i, w in enumerate(text.split(" "))]


WINDOWS = [window(words(t)) for t in TINY_TEXTS] + [window([t, " end"]) for t in NASTY]


def simulator(family: str, **options: Any) -> tuple[AllAtOnce, Any, Any]:
    model, tok = make_model(family), tokenizer()
    return AllAtOnce(lambda: (model, tok), name="tiny", dtype="float32", **options), model, tok


def plain(model: Any, sim: AllAtOnce, rule: str, shown: Window, temperature: float = 0.5) -> np.ndarray:
    """One full prompt per window, every block, every logit."""
    built = sim.builder.window(shown.pieces)
    start = [*sim.builder.header, *sim.builder.explanation(rule)]
    with torch.no_grad():
        logits = model(torch.tensor([[*start, *built.ids]])).logits[0].double()
    out = []
    for position in built.positions:
        p = torch.softmax(logits[len(start) + position], 0)[sim.builder.levels] ** (1 / temperature)
        out.append(float((p / p.sum()) @ torch.arange(6.0).double()))
    return np.array(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_simulation_equals_the_plain_way(family: str):
    sim, model, _ = simulator(family, batch_tokens=600)
    found = sim.predict(Explanation.sentence("months", P), WINDOWS)
    assert sim.model.shares_prefix == (family != "gemma2")
    for shown, simulation in zip(WINDOWS, found, strict=True):
        assert simulation.expected is not None
        np.testing.assert_allclose(simulation.expected, plain(model, sim, "months", shown), atol=1e-4)


def test_predictions_differ_and_depend_on_the_explanation():
    sim, _, _ = simulator("llama")
    a = np.concatenate([s.expected for s in sim.predict(Explanation.sentence("months", P), WINDOWS)])
    b = np.concatenate(
        [s.expected for s in sim.predict(Explanation.sentence("nothing of the kind", P), WINDOWS)]
    )
    assert a.min() >= 0 and a.max() <= 5 and a.std() > 0.01 and np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_sharpens_the_level_distribution(temperature: float):
    sim, model, _ = simulator("qwen2", temperature=temperature)
    found = sim.predict(Explanation.sentence("months", P), WINDOWS[:2])
    for shown, simulation in zip(WINDOWS, found, strict=False):
        np.testing.assert_allclose(
            simulation.expected, plain(model, sim, "months", shown, temperature), atol=1e-4
        )


@pytest.mark.parametrize("batch_tokens", [400, 4000])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_rules_are_the_maximum_of_level_times_strength(family: str, batch_tokens: int):
    sim, model, _ = simulator(family, batch_tokens=batch_tokens)
    rules = Explanation(
        (Rule("months", 5), Rule("words about the sea and about those who sail on it", 2), Rule("a", 4)), P
    )
    found = sim.predict(rules, WINDOWS[:6])
    for shown, simulation in zip(WINDOWS, found, strict=False):
        levels = [plain(model, sim, r.activates_on, shown) * r.strength / 5 for r in rules.rules]
        np.testing.assert_allclose(simulation.expected, np.max(levels, 0), atol=1e-4)


def test_rules_and_windows_are_one_batch_behind_a_header_that_is_read_once():
    sim, _, _ = simulator("llama", batch_tokens=10**6)
    passes = []
    sim.model.body.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rules = Explanation((Rule("months", 5), Rule("words about the sea", 2), Rule("a", 4)), P)
    for _ in range(2):
        sim.predict(rules, WINDOWS)
    header, lines, batch, *again = passes
    assert (
        header == (1, len(sim.builder.header))
        and lines[0] == 3
        and batch[0] == 3 * len(WINDOWS)
        and again == [lines, batch]
    )


@pytest.mark.parametrize("sliding", [80, 106, 112, 4096])
def test_branches_of_a_model_with_a_sliding_window(sliding: int):
    """Wherever the window ends, the result is that of whole prompts."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = (
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8, sliding_window=sliding))
        .eval()
        .requires_grad_(False)
    )
    prefix_model = PrefixModel(model)
    prefix = prefix_model.prefix(torch.randint(1, 500, (100,)).tolist())
    rows = [[5, 6, 7], [8], [9, 10]]
    ids = torch.randint(1, 500, (6, 7))
    found = prefix_model.hidden(prefix_model.branches(prefix, rows), ids)
    for number, row in enumerate(rows):
        expected = prefix_model.hidden(prefix_model.prefix(row, prefix), ids[2 * number : 2 * number + 2])
        torch.testing.assert_close(found[2 * number : 2 * number + 2], expected, atol=1e-4, rtol=1e-4)


def test_levels_stand_after_the_tab_of_their_token():
    sim, _, tok = simulator("llama")
    shown = window([" a\tb", "\n", "", " <|endoftext|>"])
    built = sim.builder.window(shown.pieces)
    assert len(built.positions) == 4 and all(built.ids[p] == sim.builder._tab for p in built.positions)
    text = tok.decode(built.ids)
    assert text.splitlines() == [" a\\tb\tunknown", "\\n\tunknown", "\tunknown", " <|endoftext|>\t"]
    assert not set(built.ids) & set(tok.all_special_ids)


def test_the_order_of_windows_and_batches_changes_nothing():
    sim, _, _ = simulator("llama", batch_tokens=10_000)
    small, _, _ = simulator("llama", batch_tokens=1)
    e = Explanation.sentence("months", P)
    forward, backward = sim.predict(e, WINDOWS), sim.predict(e, WINDOWS[::-1])[::-1]
    alone = small.predict(e, WINDOWS)
    for a, b, c in zip(forward, backward, alone, strict=True):
        np.testing.assert_allclose(a.expected, b.expected, atol=1e-5)
        np.testing.assert_allclose(a.expected, c.expected, atol=1e-5)


def test_a_model_is_loaded_only_when_it_is_needed():
    loads = []
    model = make_model("llama")

    def load() -> tuple[Any, Any]:
        loads.append(1)
        return model, tokenizer()

    sim = AllAtOnce(load, name="tiny", dtype="float32")
    assert sim.settings["prompt"] == "simulate-all-at-once/v2" and not loads
    anyio.run(sim.simulate, RULES, WINDOWS[:1])
    sim.predict(RULES, WINDOWS[:1])
    assert len(loads) == 1


def test_the_attention_of_the_model_is_put_back():
    model = make_model("llama")
    before = model.config._attn_implementation
    prefix_model = PrefixModel(model)
    prefix = prefix_model.prefix([3, 4, 5])
    prefix_model.hidden(prefix, torch.tensor([[6, 7]]))
    assert model.config._attn_implementation == before
    with pytest.raises((IndexError, RuntimeError)):
        prefix_model.hidden(prefix, torch.tensor([[10**6]]))
    assert model.config._attn_implementation == before


def test_extending_a_prefix_equals_computing_it_whole():
    prefix_model = PrefixModel(make_model("gemma3"))
    whole, first = prefix_model.prefix([3, 4, 5, 6, 7]), prefix_model.prefix([3, 4])
    stepwise = prefix_model.prefix([5, 6, 7], first)
    assert first.n_tokens == 2 and stepwise.n_tokens == 5
    for (k1, v1), (k2, v2) in zip(whole.layers, stepwise.layers, strict=True):
        torch.testing.assert_close(k1, k2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v1, v2, rtol=1e-4, atol=1e-5)
    assert first.layers[0][0].shape[2] == 2


def test_sliding_windows_shorter_than_the_prompt_take_the_plain_way():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    model = Gemma3ForCausalLM(config).eval()
    prefix_model = PrefixModel(model)
    start, ids = list(range(5, 35)), torch.randint(0, 512, (2, 9))
    found = prefix_model.hidden(prefix_model.prefix(start), ids)
    with torch.no_grad():
        expected = model.base_model(torch.cat([torch.tensor([start] * 2), ids], 1)).last_hidden_state[:, 30:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


TEMPLATES = {
    "with a system turn": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content "
    "}}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "without": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') "
    "}}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_chat_form_is_what_the_template_says(kind: str):
    sim, model, tok = simulator("llama", chat=True)
    tok.chat_template = TEMPLATES[kind]
    shots = sim.prompt.json("settings.json")
    builder = sim.builder
    text = tok.decode(builder.header + builder.explanation("months <|im_start|>"))
    intro = shots["intro"] + ("<|endoftext|>\n" if kind != "without" else "\n\nNeuron: ")
    assert text.startswith(f"<|im_start|>{'system' if kind != 'without' else 'user'}\n{intro}")
    assert text.count("<|im_start|>assistant\n") == len(shots["few_shot"]) + 1 and text.endswith(
        "<|im_start|>assistant\n"
    )
    assert "Neuron: months <|im_start|>" in text and "\ufffc" not in text
    special = tok.convert_tokens_to_ids("<|im_start|>")
    assert builder.explanation("months <|im_start|>").count(special) == 1, (
        "the explanation's text became a turn of the chat"
    )
    found = sim.predict(Explanation.sentence("months", P), WINDOWS[:4])
    for shown, simulation in zip(WINDOWS, found, strict=False):
        np.testing.assert_allclose(simulation.expected, plain(model, sim, "months", shown), atol=1e-4)
    assert sim.settings["chat"] is True and "chat" not in simulator("llama")[0].settings


def test_a_tokenizer_without_a_template_cannot_chat():
    sim, _, tok = simulator("llama", chat=True)
    with pytest.raises(IncompatibleError, match="no chat template"):
        sim.predict(RULES, WINDOWS[:1])
    tok.chat_template = "{{ messages[0].content }}"
    with pytest.raises(IncompatibleError, match="leaves out"):
        sim.predict(RULES, WINDOWS[:1])


def test_tokenizers_and_temperatures_that_cannot_work():
    with pytest.raises(InputError, match="temperature"):
        simulator("llama", temperature=0.0)

    class Split:
        def encode(self, text: str, **_: object) -> list[int]:
            return [1, 2] if text == "3" else [1]

    assert single(Split(), "4") == 1
    with pytest.raises(IncompatibleError, match="writes '3' as 2 tokens"):
        single(Split(), "3")


def rated(
    answer: Any, windows: list[Window], explanation: Explanation = RULES, per: int = 2
) -> tuple[list[Any], FunctionModel]:
    model = FunctionModel(answer)
    return anyio.run(Rated(model, windows_per_request=per).simulate, explanation, windows), model


def levels_for(request: Request, level: int) -> str:
    assert request.schema is not None
    sizes = [t["minItems"] for t in request.schema["properties"]["levels"]["prefixItems"]]
    return json.dumps({"levels": [[level] * n for n in sizes]})


def test_rated_combines_rules_and_keeps_order():
    found, model = rated(lambda r: levels_for(r, 3 if "months" in r.messages[-1].content else 5), WINDOWS[:3])
    assert [len(s.expected) for s in found] == [len(w.pieces) for w in WINDOWS[:3]]
    assert set(found[0].expected.tolist()) == {3.0} and len(model.requests) == 4
    only_sea, _ = rated(lambda r: levels_for(r, 5), WINDOWS[:1], Explanation((Rule("sea", 2),), P))
    assert set(only_sea[0].expected.tolist()) == {2.0}


def test_a_rated_reply_of_the_wrong_length_fails_its_windows_alone():
    def answer(request: Request) -> str:
        return '{"levels": [[1]]}' if "Zürich" in request.messages[-1].content else levels_for(request, 1)

    found, model = rated(answer, WINDOWS[2:6], Explanation.sentence("x", P))
    assert [s.expected is None for s in found] == [True, True, False, False]
    assert "MalformedReplyError" in found[0].failure and len(model.requests) == 4


def test_rated_refusals_are_not_asked_again():
    asked = []

    def refuse(request: Request) -> str:
        asked.append(request)
        raise EndpointRefusedError("no such model")

    with pytest.raises(EndpointRefusedError, match="no such model"):  # it would refuse the next feature too
        rated(refuse, WINDOWS[:2], Explanation.sentence("x", P))
    assert len(asked) == 1
    cut, _ = rated(lambda _: Reply(("{",), (True,), Usage()), WINDOWS[:1], Explanation.sentence("x", P))
    assert "TruncatedReplyError" in cut[0].failure
    outside, _ = rated(lambda r: levels_for(r, 9), WINDOWS[:1], Explanation.sentence("x", P))
    assert "lies outside 0 to 5" in outside[0].failure
