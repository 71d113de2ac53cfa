"""The token-wise simulator: equal to whole prompts read one by one, calibrated as the formula says, and no
token read twice.
"""

from __future__ import annotations

from typing import Any

import anyio
import numpy as np
import pytest
import torch
from test_simulate import WINDOWS, P, window
from tiny import FAMILIES, make_model, tokenizer

import featureinterp as fi
from featureinterp.domain.explanation import Explanation, Rule
from featureinterp.domain.record import Window
from featureinterp.errors import InputError
from featureinterp.jobs.spec import make_job
from featureinterp.local.token_wise import TokenWise

RULES = Explanation(
    (Rule("months", 5), Rule("words about the sea and about those who sail on it", 2), Rule("a", 4)), P
)


def simulator(family: str = "llama", **options: Any) -> tuple[TokenWise, Any, Any]:
    model, tok = make_model(family), tokenizer()
    return TokenWise(lambda: (model, tok), name="tiny", dtype="float32", **options), model, tok


def said(model: Any, sim: TokenWise, topic: str, piece: str) -> np.ndarray:
    """Probabilities of the six levels: the full prompt of one token, every block, every logit."""
    ids = [*sim.header, *sim.explanation(topic), *sim.token(piece)]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), 0)
    levels = [sim.tokenizer.encode(level, add_special_tokens=False)[0] for level in "012345"]
    return (p[levels] / p[levels].sum()).numpy()


def plain(model: Any, sim: TokenWise, rule: str, shown: Window, temperature: float = 1.5) -> np.ndarray:
    out = []
    for piece in shown.pieces:
        ratio = (said(model, sim, rule, piece) / said(model, sim, "something", piece)) ** (1 / temperature)
        p = ratio * np.array([0.92, 0.016, 0.016, 0.016, 0.016, 0.016])
        out.append(p @ np.arange(6) / p.sum())
    return np.array(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_simulation_equals_whole_prompts(family: str):
    sim, model, _ = simulator(family, batch_tokens=100)
    for shown, simulation in zip(
        WINDOWS, sim.predict(Explanation.sentence("months", P), WINDOWS), strict=True
    ):
        np.testing.assert_allclose(simulation.expected, plain(model, sim, "months", shown), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_applied_before_the_prior(temperature: float):
    sim, model, _ = simulator(temperature=temperature)
    [simulation] = sim.predict(Explanation.sentence("months", P), WINDOWS[:1])
    np.testing.assert_allclose(
        simulation.expected, plain(model, sim, "months", WINDOWS[0], temperature), atol=1e-4
    )


def test_the_neutral_topic_predicts_the_prior_everywhere():
    sim, _, _ = simulator()
    for simulation in sim.predict(Explanation.sentence("something", P), WINDOWS):
        np.testing.assert_allclose(simulation.expected, 0.016 * 15, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4000])
def test_several_rules_are_the_maximum_of_level_times_strength(batch_tokens: int):
    sim, model, _ = simulator(batch_tokens=batch_tokens)
    for shown, simulation in zip(WINDOWS, sim.predict(RULES, WINDOWS[:5]), strict=False):
        levels = [plain(model, sim, r.activates_on, shown) * r.strength / 5 for r in RULES.rules]
        np.testing.assert_allclose(simulation.expected, np.max(levels, 0), atol=1e-4)


def test_a_token_is_read_once_and_the_neutral_topic_once_per_process():
    sim, _, _ = simulator(batch_tokens=10**6)
    shapes = []
    sim.model.body.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shown = [window([" a", " b", " a"]), window([" b", " a", " b"])]
    sim.predict(RULES, shown)
    header, lines, rules, neutral_line, neutral = shapes
    assert (
        header == (1, len(sim.header))
        and lines[0] == 3
        and rules[0] == 3 * 2
        and neutral_line[0] == 1
        and neutral[0] == 2
    )
    shapes.clear()
    found = sim.predict(Explanation.sentence("months", P), [*shown, window([])])
    assert [s[0] for s in shapes] == [1, 2] and [
        len(s.expected) for s in found if s.expected is not None
    ] == [3, 3, 0]
    shapes.clear()
    sim.predict(Explanation.sentence("seas", P), [window([" a", " c"])])
    assert [s[0] for s in shapes] == [1, 2, 1, 1]


def test_kept_neutral_readings_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("featureinterp.local.token_wise.KEPT", 3)
    sim, model, _ = simulator()
    shown = window([" a", " b", " c", " d", " e"])
    [first] = sim.predict(Explanation.sentence("months", P), [shown])
    assert len(sim._neutral) == 3
    np.testing.assert_allclose(first.expected, plain(model, sim, "months", shown), atol=1e-4)
    [again] = sim.predict(Explanation.sentence("months", P), [shown])
    np.testing.assert_allclose(again.expected, first.expected, atol=1e-5)


def test_lines_hold_what_they_say_and_nothing_special():
    sim, _, tok = simulator()
    ids = [*sim.explanation("a\nb <|endoftext|>"), *sim.token(" c\td\n")]
    assert tok.decode(ids) == "Topic: a\\nb <|endoftext|>\n c\\td\\n\t" and not set(ids) & set(
        tok.all_special_ids
    )
    header = tok.decode([i for i in sim.header if i != tok.bos_token_id])
    assert header.startswith("How well does a word fit a topic") and header.endswith(
        "Topic: names of people\n Margaret\t5\n\n"
    )


def test_nothing_is_loaded_before_a_window_is_simulated():
    loads = []

    def load() -> tuple[Any, Any]:
        loads.append(1)
        return make_model("llama"), tokenizer()

    sim = TokenWise(load, name="tiny", dtype="float32")
    assert (
        sim.settings["simulator"] == "token-wise"
        and sim.settings["prompt"] == "simulate-token-wise/v1"
        and not loads
    )
    anyio.run(sim.simulate, RULES, WINDOWS[:1])
    sim.predict(RULES, WINDOWS[:1])
    assert len(loads) == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="temperature of 0"):
        simulator(temperature=0.0)
    with pytest.raises(InputError, match="no local simulator 'lexical'"):
        fi.local_simulator(kind="lexical")
    with pytest.raises(InputError, match="has no chat form"):
        make_job(run="run", simulator="token-wise", simulator_chat=True)
