"""Interventions: exactly nothing at dose 0, exactly the direction elsewhere, and what is made of the
texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from endpoint import endpoint, play
from test_cli import cli
from tiny import make_model, make_sae, make_subject_folder, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.intervention import Intervention, SteeredText
from featureinterp.domain.record import Window
from featureinterp.errors import IncompatibleError, InputError
from featureinterp.falsification.intervention import Interventions, SteeringSettings
from featureinterp.subject.hooks import find_blocks, residual_after
from featureinterp.subject.load import load_causal_lm
from featureinterp.subject.steering import added, random_directions, write

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt-neox"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = make_subject_folder(tmp_path_factory.mktemp(request.param), request.param)
    return load_causal_lm(str(folder), device="cpu", dtype="float32")


IDS = torch.tensor([[1, 5, 9, 40, 7]])


def test_dose_0_is_the_model_bit_for_bit(causal: tuple):
    model, _ = causal
    plain = model(input_ids=IDS).logits
    for nothing in (None, torch.zeros(32)):
        with added(model, HOOK, nothing):
            assert torch.equal(model(input_ids=IDS).logits, plain)
    with added(model, HOOK, torch.ones(32)):
        assert not torch.equal(model(input_ids=IDS).logits, plain)
    assert torch.equal(model(input_ids=IDS).logits, plain), "the hook is gone"


def test_the_direction_is_added_to_every_token_but_the_first(causal: tuple):
    model, _ = causal
    block = find_blocks(model, 3)[1]
    seen: list[torch.Tensor] = []

    def look(_m: object, _a: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    vector = torch.randn(32)
    handle = block.register_forward_hook(look)
    model(input_ids=IDS)
    handle.remove()
    with added(model, HOOK, vector):
        handle = block.register_forward_hook(look)
        model(input_ids=IDS)
        handle.remove()
    difference = (seen[1] - seen[0])[0]
    torch.testing.assert_close(difference[0], torch.zeros(32))
    torch.testing.assert_close(difference[1:], vector.expand(4, 32), atol=1e-5, rtol=1e-5)


def test_dose_1_adds_what_the_feature_itself_contributes(causal: tuple):
    """Of an SAE that normalises tokens a code is in units of the token's deviation: 3 times the row, times
    that deviation.
    """
    model, _ = causal
    sae = make_sae("topk", 32, 8)
    sae = type(sae)(sae.tensors, normalize="layer_norm", **sae.options)
    states = residual_after(model, find_blocks(model, 3)[1], {"input_ids": IDS})[0]
    codes = sae.encode(states)
    feature = int(codes.features[-1])
    moved = steered_states(model, 3 * sae.W_dec[feature], sae.units) - states
    deviations = [float(np.sqrt(((row - row.mean()) ** 2).sum() / 31)) for row in states.double().numpy()]
    by_hand = torch.stack([3 * deviation * sae.W_dec[feature] for deviation in deviations])
    torch.testing.assert_close(moved[1:], by_hand[1:], rtol=1e-4, atol=1e-4)
    assert not moved[0].any()
    more = replace(codes, values=torch.where(codes.features == feature, codes.values + 3, codes.values))
    touched = torch.unique(codes.rows[codes.features == feature])
    own = sae.decode(more)[touched] - sae.decode(codes)[touched]
    torch.testing.assert_close(own, by_hand[touched], rtol=1e-3, atol=1e-3)


def test_units_are_the_deviation_only_where_tokens_are_normalised():
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 0.0, 10.0]])
    sae = make_sae("topk", 4, 8)
    for normalize, expected in (
        ("none", [1.0, 1.0]),
        ("center", [1.0, 1.0]),
        ("layer_norm", [2.5819889, 5.0]),
    ):
        found = type(sae)(sae.tensors, normalize=normalize, **sae.options).units(x)
        torch.testing.assert_close(found, torch.tensor(expected))


def steered_states(model: torch.nn.Module, vector: torch.Tensor, units: object) -> torch.Tensor:
    """The residual stream of the one text after the direction was added, ``[token, d_model]``."""
    with added(model, HOOK, vector, units):
        return residual_after(model, find_blocks(model, 3)[1], {"input_ids": IDS})[0]


def test_a_wrong_width_is_an_error_and_leaves_no_hook(causal: tuple):
    model, _ = causal
    plain = model(input_ids=IDS).logits
    with pytest.raises(IncompatibleError, match="width 32"), added(model, HOOK, torch.ones(31)):
        model(input_ids=IDS)
    assert torch.equal(model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("dose", [0.0, 3.0])
def test_writing_equals_reading_everything_anew_each_time(causal: tuple, dose: float):
    model, tokenizer = causal
    vector = dose * random_directions(32, 1, seed=0)[0]
    found = write(model, tokenizer, HOOK, vector, ["The army"], max_tokens=6, temperature=0, seed=0)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("The army", add_special_tokens=False)]
    first = len(ids)
    for _ in range(6):
        with added(model, HOOK, vector):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    assert found == [tokenizer.decode(ids[first:], skip_special_tokens=True)]


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_an_opening_of_one_token_is_not_pushed_where_nothing_stands_before_it(family: str):
    """A model without BOS: the opening's token is the text's first, the attention sink."""
    model, names = make_model(family), tokenizer(bos=False)
    opening = names.decode([names.encode("the", add_special_tokens=False)[0]])
    ids = names.encode(opening, add_special_tokens=False)
    assert len(ids) == 1
    vector = 3 * random_directions(32, 1, seed=0)[0]
    block = find_blocks(model, 3)[1]

    def push(_m: object, _a: object, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, 1:] += vector
        return (states, *output[1:]) if isinstance(output, tuple) else states

    found = write(model, names, HOOK, vector, [opening], max_tokens=5, temperature=0, seed=0)
    handle = block.register_forward_hook(push)
    for _ in range(5):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    handle.remove()
    assert found == [names.decode(ids[1:], skip_special_tokens=True)]


def test_what_is_written_keeps_the_space_before_its_first_word():
    """Tokenizers of the SentencePiece kind drop it when a text's middle is decoded alone."""
    words = {f"▁w{i}": i for i in range(512)}
    raw = Tokenizer(models.WordLevel(words, unk_token="▁w0"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    names = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert names.decode([7, 8]) == "w7 w8"
    [found] = write(make_model("llama"), names, HOOK, None, ["w1 w2"], max_tokens=4, temperature=0, seed=0)
    assert found.startswith(" w") and len(found.split()) == 4


def test_the_same_seed_writes_the_same_text(causal: tuple):
    model, tokenizer = causal
    once, again, other = (
        write(model, tokenizer, HOOK, None, ["We", "We"], max_tokens=12, temperature=1.0, seed=s)
        for s in (1, 1, 2)
    )
    assert once == again != other and once[0] != once[1]


def test_texts_do_not_depend_on_those_that_are_written_with_them(causal: tuple):
    model, tokenizer = causal
    openings = ["The army", "We", "The fleet", "A"]
    vector = 2 * random_directions(32, 1, seed=0)[0]
    together = write(model, tokenizer, HOOK, vector, openings, max_tokens=10, temperature=0, seed=3)
    assert together == [
        write(model, tokenizer, HOOK, vector, [o], max_tokens=10, temperature=0, seed=3)[0] for o in openings
    ]
    sampled = write(model, tokenizer, HOOK, vector, openings, max_tokens=10, temperature=1.0, seed=3)
    assert (
        sampled[0]
        == write(model, tokenizer, HOOK, vector, openings[:1], max_tokens=10, temperature=1.0, seed=3)[0]
    )


def test_random_directions_are_of_unit_length_and_differ():
    found = random_directions(50, 3, seed=4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert float((found @ found.T - torch.eye(3)).abs().max()) < 0.6
    torch.testing.assert_close(random_directions(50, 2, seed=4), found[:2])


class Plays:
    """A subject that writes "sea" when it is pushed along the feature, and names the random direction
    otherwise.
    """

    settings = {"model": "m"}

    def __init__(self) -> None:
        self.asked: list[tuple[float, int | None]] = []

    async def write(
        self,
        feature: int,
        amount: float,
        openings: Sequence[str],
        *,
        random: int | None = None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        self.asked.append((amount, random))
        word = "plain" if amount == 0 else "sea" if random is None and amount > 4 else f"r{random}"
        return [f" {word} {i}" for i in range(len(openings))]

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        return [
            Window(i, i, np.zeros(1, np.int32), (t,), np.array([3.0 if "sea" in t else 0.0], np.float32))
            for i, t in enumerate(texts)
        ]


SAYS = Explanation((Rule("the sea", 5),), Provenance("x"))


def test_doses_controls_and_effect():
    plays, judged = Plays(), []

    async def judge(explanation: Explanation, texts: Sequence[str]) -> list[float | None]:
        judged.append(list(texts))
        return [None if t.startswith("B r1") else 0.9 if "sea" in t else 0.1 for t in texts]

    made = Interventions(plays, plays, judge, SteeringSettings((2.0, 1.0), ("A", "B"), n_random=2))
    written = anyio.run(made.write, FeatureId("s", 1), 4.0)
    assert plays.asked == [(0.0, None), (4.0, None), (4.0, 0), (4.0, 1), (8.0, None), (8.0, 0), (8.0, 1)]
    found = anyio.run(made.judged, SAYS, written)
    assert len(judged[0]) == len(set(judged[0])), "equal texts are asked about once"
    assert (
        found.doses == (0.0, 1.0, 2.0)
        and found.match(2.0, "feature") == pytest.approx(0.9)
        and found.match(2.0, "random") == pytest.approx(0.1)
    )
    assert [t.activation for t in found.at(2.0, "feature")] == [3.0, 3.0] and len(
        found.at(0.0, "random")
    ) == 2
    effect = found.effect(2.0)
    assert effect.value == pytest.approx(0.8) and effect.n_scored == 5 and effect.n_failed == 1
    assert effect.interval is not None and effect.interval.low == pytest.approx(0.8)
    assert Intervention.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert (
        Intervention((SteeredText("A", "x", "feature", 1.0, 0.0),)).effect(1.0).undefined
        == "no text could be judged"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"doses": ()},
        {"doses": (0.0,)},
        {"doses": (-1.0,)},
        {"doses": (float("inf"),)},
        {"doses": (1.0, float("nan"))},
        {"openings": ()},
        {"openings": (" ",)},
        {"n_random": 0},
        {"max_tokens": 0},
    ],
)
def test_settings_that_steer_nothing_are_refused(wrong: dict):
    with pytest.raises(InputError, match="steering needs"):
        SteeringSettings(**wrong)


def test_the_verb_steers_what_was_explained_and_pays_once(tmp_path: Path, run: Path, subject_folder: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with endpoint(play) as server:
        options = [
            "--features",
            "random:2",
            "--simulator",
            "lexical",
            "--no-questions",
            "--n-test",
            "3",
            "--negatives",
            "random",
            "--model",
            str(subject_folder),
        ]
        assert (
            cli("explain", str(copy), *options, "--base-url", server.url, "--llm-model", "m").returncode == 0
        )
        asked = len(server.ledger)
        done = cli(
            "steer",
            str(copy),
            "--doses",
            "0,1,4",
            "--opening",
            "The army",
            "--opening",
            "We",
            "--max-tokens",
            "6",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        for feature in json.loads(done.stdout)["features"]:
            texts = feature["intervention"]
            assert (
                len(texts) == 2 + 2 * 3 * 2
                and {t[2] for t in texts} == {"none", "feature", "random"}
                and all(t[5] is not None for t in texts)
            )
            assert any(s["name"] == "steering_effect" and s["value"] is not None for s in feature["scores"])
        assert len(server.ledger) > asked and not server.paid_twice()
        asked = len(server.ledger)
        again = cli(
            "steer",
            str(copy),
            "--doses",
            "0,1,4",
            "--opening",
            "The army",
            "--opening",
            "We",
            "--max-tokens",
            "6",
        )
        assert again.returncode == 0 and len(server.ledger) == asked and "dose 4" in again.stdout
    page = (copy / "explain" / "report.html").read_text()
    assert "Steered" in page and "random directions" in page
    wrong = cli("steer", str(copy), "--doses", "much")
    assert wrong.returncode == 2 and "are no doses" in wrong.stderr
