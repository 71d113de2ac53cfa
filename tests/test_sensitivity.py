"""Sensitivity: texts exactly as they were written, rates against other implementations, nothing lost, nothing
paid twice.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest
from endpoint import completion, endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from replies_of import texts_in
from test_cli import cli
from tiny import NASTY, TINY_TEXTS

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.rate import Rate
from featureinterp.domain.record import Window
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointUnavailableError, FeatureRangeError, InputError, MalformedReplyError
from featureinterp.falsification.saebench import examples_in, examples_of_log
from featureinterp.falsification.sensitivity import Example, FeatureSensitivity, base_rate, example
from featureinterp.falsification.writing import TextWriter, without_marks
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.sensitivity import SensitivityJob, SensitivityPlan
from featureinterp.jobs.sensitivity_run import SensitivityJobSpec, _chosen
from featureinterp.llm.cached import Cached, ReplyStore
from featureinterp.llm.function import FunctionModel
from featureinterp.llm.metered import Meter, Metered
from featureinterp.llm.tally import Tallied
from featureinterp.reports.sensitivity import write_sensitivity
from featureinterp.stored.sums import read_marker


def texts_reply(texts: Sequence[str]) -> str:
    return json.dumps({"texts": list(texts)}, ensure_ascii=False)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda t: t.strip()),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_texts_are_exactly_those_of_the_reply(texts: list[str]):
    assert texts_in(texts_reply(texts)) == texts
    assert texts_in(json.dumps({"texts": texts})) == texts


def test_texts_with_line_breaks_braces_and_odd_characters():
    nasty = [t for t in NASTY if t.strip()]
    assert texts_in("Here you are:\n```json\n" + texts_reply(nasty) + "\n```") == nasty
    assert texts_in(texts_reply(["a", "  ", "a", "b"])) == ["a", "b"], "empty texts and repetitions are none"
    with pytest.raises(MalformedReplyError):
        texts_in("I cannot do that.")


def test_marks_that_were_copied_are_taken_out():
    assert without_marks("the<< bridge>> and <<that>> << x") == "the bridge and that << x"
    assert without_marks("a < b << c") == "a < b << c"


def write(
    answer: Callable[[Request], str | Reply], n: int = 6, per_call: int = 3
) -> tuple[list, FunctionModel]:
    model = FunctionModel(answer)
    return anyio.run(TextWriter(model, per_call=per_call).write, ["one<< two>> three", "four"], n), model


def test_the_writer_asks_until_it_has_enough():
    counter = iter(range(100))
    calls, model = write(lambda r: texts_reply([f"text {next(counter)}" for _ in range(2)]))
    assert [c.status for c in calls] == ["short", "short", "success"] and sum(
        len(c.texts) for c in calls
    ) == 6
    assert [c.asked for c in calls] == [3, 3, 2] and len({r.seed for r in model.requests}) == 3
    assert (
        model.requests[0].schema is not None and "one<< two>> three" in model.requests[0].messages[-1].content
    )
    calls, _ = write(lambda r: texts_reply([f"text {next(counter)}" for _ in range(4)]))
    assert [len(c.texts) for c in calls] == [3, 3], "more than asked for are left out"


def test_the_writer_keeps_failures_and_gives_up():
    calls, _ = write(lambda r: "no")
    assert len(calls) == 4 and all(
        c.status.startswith("failed: MalformedReplyError") and c.reply is None for c in calls
    )

    def down(_: Request) -> str:
        raise EndpointUnavailableError("down")

    calls, model = write(down)
    assert [c.status for c in calls] == ["failed: EndpointUnavailableError: down"] and len(
        model.requests
    ) == 1
    cut = Reply((texts_reply(["whole", "also whole"])[:-8],), (True,), Usage())
    calls, _ = write(lambda _: cut, n=1)
    assert calls[0].texts == ("whole",), "the last text of a reply that was cut is left out"


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (7, 23)])
def test_intervals_are_wilsons(hits: int, n: int):
    z, p = 1.959963984540054, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = Rate(hits, n).interval
    assert interval is not None and (interval.low, interval.high) == pytest.approx(
        (centre - half, centre + half), abs=1e-9
    )
    assert Rate(0, 0).value is None and Rate(0, 0).interval is None


def test_the_base_rate_is_that_of_random_spans():
    rng = np.random.default_rng(0)
    lengths, window = rng.integers(5, 17, size=300), 16
    positions = np.array(
        sorted({int(r) * window + int(rng.integers(lengths[r])) for r in rng.integers(300, size=120)}),
        np.uint32,
    )
    fires = {int(p) for p in positions}
    slow = []
    for _ in range(6000):
        row = int(rng.integers(300))
        size = min(int(rng.choice([3, 7])), int(lengths[row]))
        start = row * window + int(rng.integers(lengths[row] - size + 1))
        slow.append(any(p in fires for p in range(start, start + size)))
    found = base_rate(positions, lengths, window, [3, 7], n=6000)
    assert found == pytest.approx(np.mean(slow), abs=0.03)
    assert base_rate(positions, lengths, window, []) is None


def test_an_example_is_the_part_around_the_peak():
    window = Window(0, 0, np.arange(7), tuple("abcdefg"), np.array([0, 0, 0.001, 4, 2, 0, 1], np.float32))
    found = example(window, 4.0, 2)
    assert (found.text, found.shown, found.activation, found.tokens) == (
        "bcdef",
        "bc<<de>>f",
        4.0,
        tuple("bcdef"),
    )
    assert example(window, 4.0, 50).text == "abcdefg"


class WordActivator:
    """Fires where one of a feature's words stands; a token is a character run between spaces."""

    WORDS = {1: "war", 2: "sea"}

    def __init__(self) -> None:
        self.read: list[str] = []

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        self.read += texts
        out = []
        for i, text in enumerate(texts):
            pieces = tuple(p for p in text.replace(" ", " \0").split("\0") if p)
            activations = np.array(
                [3.0 if self.WORDS[feature.index] in p else 0.0 for p in pieces], np.float32
            )
            out.append(Window(i, i, np.arange(len(pieces), dtype=np.int32), pieces, activations))
        return out


def feature(index: int) -> FeatureSensitivity:
    word = WordActivator.WORDS[index]
    shown = [
        Example(f"the {word} of {i}", f"the <<{word}>> of {i}", 3.0, ("the ", f"{word} ", "of ", str(i)))
        for i in range(3)
    ]
    return FeatureSensitivity(
        index, 4.0, (*shown, Example(f"no {word}", "x", 2.0, ("no", f" {word}"), held_out=True))
    )


def about(request: Request) -> str:
    return "war" if "<<war>>" in request.messages[-1].content else "sea"


def job(
    tmp_path: Path,
    answer: Callable[[Request], str],
    *,
    budget: Budget | None = None,
    n: int = 4,
    retry_failed: bool = False,
) -> tuple[SensitivityJob, FunctionModel, WordActivator]:
    model, activator, meter = FunctionModel(answer), WordActivator(), Meter()
    writer = TextWriter(
        Tallied(
            Cached(Metered(model, meter), ReplyStore(tmp_path / "replies.sqlite"), retry_failed=retry_failed)
        ),
        per_call=n,
    )
    plan = SensitivityPlan(samples=n, per_call=n, concurrency=1)
    return (
        SensitivityJob(
            Journal(tmp_path / "j.sqlite"),
            writer,
            activator,
            plan,
            sae="s",
            source="x",
            meter=meter,
            guard=Guard(budget or Budget(), lambda: meter.usage),
        ),
        model,
        activator,
    )


def run_job(made: SensitivityJob) -> Sequence[FeatureSensitivity]:
    return anyio.run(made.run, [1, 2], lambda features: map(feature, features))


NASTY_WAR = "a {brace} % \n\n  war\t<|endoftext|> \u00e9"


def good(request: Request) -> str:
    word = about(request)
    return texts_reply(
        [NASTY_WAR if word == "war" else "at sea", f"{word} again", "nothing", f"<<{word}>> marked"]
    )


def test_rates_controls_and_drift(tmp_path: Path):
    made, _, activator = job(tmp_path, good)
    war, sea = run_job(made)
    assert (
        war.generated_sensitivity().value,
        war.original_sensitivity().value,
        war.original_sensitivity(held_out=True).value,
    ) == (0.75, 1.0, 1.0)
    assert war.control_of == 2 and war.control_rate().value == 0.0 and sea.control_of == 1
    assert (
        war.generated_sensitivity(0.5 * war.scale).value == 0.75
        and war.generated_sensitivity(3.5).value == 0.0
    )
    assert war.drift == 0.25, "the one that was held out had other tokens"
    assert NASTY_WAR in activator.read and "war marked" in activator.read and made.stopped is None


def test_a_second_run_pays_and_reads_nothing(tmp_path: Path):
    first = run_job(job(tmp_path, good)[0])
    again, model, activator = job(tmp_path, good)
    second = run_job(again)
    assert not model.requests and not activator.read
    for a, b in zip(first, second, strict=True):
        assert (
            a.texts == b.texts
            and a.generated_sensitivity() == b.generated_sensitivity()
            and a.calls == b.calls
        )


def test_a_failure_is_a_row_and_tried_again(tmp_path: Path):
    made, _, _ = job(tmp_path, lambda r: "nothing" if about(r) == "war" else good(r))
    war, sea = run_job(made)
    assert (
        war.failure is not None
        and war.failure.stage == "write-texts"
        and war.generated_sensitivity().value is None
    )
    assert sea.failure is None and sea.generated_sensitivity().value == 0.75 and sea.control_of is None
    assert war.original_sensitivity().value == 1.0, "its examples are read all the same"
    again, model, _ = job(tmp_path, good)
    assert run_job(again)[0].failure is not None and not model.requests, (
        "what was answered unusably is settled"
    )
    again, model, _ = job(tmp_path, good, retry_failed=True)
    assert [f.failure for f in run_job(again)] == [None, None] and {about(r) for r in model.requests} == {
        "war"
    }


def test_a_budget_stops_and_the_same_job_goes_on(tmp_path: Path):
    def costly(request: Request) -> Reply:
        return Reply((good(request),), (False,), Usage(1, 100, 50, 0.0, 0.0))

    made, model, _ = job(tmp_path, costly, budget=Budget(tokens=100))
    found = run_job(made)
    assert made.stopped is not None and len(found) == 1 and len(model.requests) == 1
    again, model, _ = job(tmp_path, costly)
    assert len(run_job(again)) == 2 and len(model.requests) == 1


COLUMNS = {
    "feature_examples": ["feature_index", "Top_act", "Sequence"],
    "generation_queries_with_responses": [
        "sae_name", "eval_name", "feature_index", "system_prompt", "user_prompt", "separator", "num_per_call",
        "llm_response", "status",
    ],
    "generated_samples": ["feature_index", "sample_index", "text"],
    "generated_samples_with_activations": [
        "feature_index", "sample_index", "text", "text_annotated", "text_clean", "tokenized_text",
        "max_activation", "all_activations",
    ],
    "original_examples_with_activations": [
        "feature_index", "sample_index", "text", "text_annotated", "text_clean", "tokenized_text",
        "max_activation", "all_activations",
    ],
    "feature_stats": ["feature_index", "generated_sensitivity", "original_sensitivity"],
}  # fmt: skip


def read(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_files(folder: Path) -> None:
    """The published columns come first, and the rates are those of the samples."""
    for name, columns in COLUMNS.items():
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert next(csv.reader(file))[: len(columns)] == columns
    samples, stats = read(folder, "generated_samples_with_activations"), read(folder, "feature_stats")
    originals = read(folder, "original_examples_with_activations")
    for row in stats:
        mine = [
            float(s["max_activation"]) > 1e-6 for s in samples if s["feature_index"] == row["feature_index"]
        ]
        shown = [
            float(s["max_activation"]) > 1e-6
            for s in originals
            if s["feature_index"] == row["feature_index"] and s["held_out"] == "False"
        ]
        assert row["generated_sensitivity"] == ("" if not mine else str(np.mean(mine))) and float(
            row["original_sensitivity"]
        ) == pytest.approx(np.mean(shown))
    for sample in samples:
        assert max([0.0, *json.loads(sample["all_activations"])]) == pytest.approx(
            float(sample["max_activation"]), abs=1e-5
        )
        assert (
            "".join(json.loads(sample["tokenized_text"]))
            == sample["text_clean"]
            == without_marks(sample["text"])
        )


def test_the_six_files(tmp_path: Path):
    found = run_job(job(tmp_path, lambda r: good(r) if about(r) == "war" else "nothing")[0])
    summary = write_sensitivity(tmp_path / "out", found, {"sae_name": "s"}, per_call=4)
    check_files(tmp_path / "out")
    assert {s["text"] for s in read(tmp_path / "out", "generated_samples")} == set(
        found[0].texts
    ) and NASTY_WAR in found[0].texts
    assert {q["status"][:6] for q in read(tmp_path / "out", "generation_queries_with_responses")} == {
        "succes",
        "failed",
    }
    assert (
        summary["n_failed"] == 1
        and summary["mean_sensitivity"]["mean"] == 0.75
        and summary["mean_sensitivity"]["n"] == 1
    )
    assert summary["sensitivity_by_threshold"]["50%"]["mean"] == 0.75
    marker = read_marker(tmp_path / "out" / "summary.json", "")
    assert marker.value == summary and marker.files is not None and len(marker.files) == 6
    assert read(tmp_path / "out", "feature_stats")[1]["failure"].startswith("the reply")


LOG = """
Generation phase
┌───────────┬──────────────────────────────────┐
│   Top act │ Sequence                         │
├───────────┼──────────────────────────────────┤
│    12.5   │ over the<< sea>>, and │ more↵end │
│ 3         │<<Sea>> of {troubles}             │
└───────────┴──────────────────────────────────┘
Explanation: water
Scoring phase
│ 9.0 │ not this │
"""


def test_published_examples_are_read_whatever_their_table_is_drawn_with():
    found = examples_of_log(LOG)
    assert [(e.activation, e.text) for e in found] == [
        (12.5, "over the sea, and │ more\nend"),
        (3.0, "Sea of {troubles}"),
    ]
    assert found[0].shown == "over the<< sea>>, and │ more\\nend"
    ascii_table = LOG.replace("│", "|").replace("┌", "+").replace("├", "+").replace("─", "-")
    assert [e.activation for e in examples_of_log(ascii_table)] == [12.5, 3.0]
    plain = (
        "Generation phase\n  Top act  Sequence\n---------  ---------\n     12.5  over the<< sea>>\n    "
        "    3  <<Sea>> of\nScoring phase\n      9.0  not this\n"
    )
    assert [(e.activation, e.text) for e in examples_of_log(plain)] == [
        (12.5, "over the sea"),
        (3.0, "Sea of"),
    ]
    assert examples_of_log("nothing here") == ()


def test_published_results_of_either_shape():
    by_key = examples_in(
        {"eval_result_unstructured": {"17": {"logs": LOG}, "x": {"logs": LOG}, "18": {"score": 1}}}
    )
    assert list(by_key) == [17]
    assert list(examples_in({"eval_result_unstructured": [{"latent": 4, "logs": LOG}, 3]})) == [4]
    for wrong in ({}, {"eval_result_unstructured": {"1": {"logs": "empty"}}}, [], None):
        with pytest.raises(InputError, match="use-saebench-examples"):
            examples_in(wrong)
    spec = SensitivityJobSpec(model="m", saes=("a",), out=Path("x"), features="17,18")
    with pytest.raises(FeatureRangeError, match="feature 18 has no published examples"):
        _chosen(spec, by_key)
    with pytest.raises(InputError, match="named twice"):
        SensitivityJobSpec(model="m", saes=("a/b", "a_b"), out=Path("x"))


def writes(body: dict) -> str:
    """The endpoint's texts: sentences of the corpus, which features of the corpus fire on now and then."""
    n = (
        body["response_format"]["json_schema"]["schema"]["properties"]["texts"]["minItems"]
        if "response_format" in body
        else 4
    )
    start = sum(map(ord, body["messages"][-1]["content"]))
    return texts_reply([f"{TINY_TEXTS[(start + i) % len(TINY_TEXTS)]} {{{i}}}\n" for i in range(n)])


def test_the_command_on_a_faulty_endpoint_loses_nothing_and_pays_once(
    tmp_path: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path
):
    out = tmp_path / "out"
    args = [
        "sensitivity",
        "--model",
        str(subject_folder),
        "--sae-names",
        str(sae_folder),
        "--features",
        "5",
        "--dataset-name",
        str(corpus_file),
        "--total-tokens",
        "3000",
    ]
    args += [
        "--context-size",
        "16",
        "--samples",
        "4",
        "--dtype",
        "float32",
        "--output-path",
        str(out),
        "--llm-model",
        "m",
        "--json",
    ]
    with endpoint(writes, faults={"500": 0.15, "truncate": 0.1, "malformed": 0.1}) as server:
        done = cli(*args, "--base-url", server.url)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)["saes"][0]
        folder = Path(summary["folder"])
        check_files(folder)
        assert summary["n_features"] == 5 and summary["n_failed"] == 0 and not server.paid_twice()
        assert len(read(folder, "generated_samples")) == 20 and all(
            s["text"].endswith("}\n") for s in read(folder, "generated_samples")
        )
        asked = len(server.ledger)
        again = cli(*args, "--base-url", server.url)
        assert json.loads(again.stdout) == json.loads(done.stdout) and len(server.ledger) == asked
    assert (out / "sensitivity.png").exists() and (out / "sensitivity.svg").exists()


def test_the_end_of_the_command_says_what_failed_and_why(
    tmp_path: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path
):
    """Half of the features get no text at all, the other half too few; tokens are counted with the tokenizer
    that the endpoint names.
    """
    number = 0

    def answer(body: dict) -> dict:
        nonlocal number
        number += 1
        texts = (
            texts_reply([f"{TINY_TEXTS[0]} {body.get('seed')} {len(str(body['messages']))}"])
            if number % 2
            else "no"
        )
        return {k: v for k, v in completion(texts).items() if k != "usage"}

    config = tmp_path / "c.toml"
    with endpoint(answer) as server:
        config.write_text(
            f"[endpoints.e]\nbase_url = '{server.url}'\nmodel = 'm'\ntokenizer = '{subject_folder}'\nprice "
            f"= {{ input = 1, output = 1 }}\n"
        )
        args = (
            "--model",
            str(subject_folder),
            "--sae-names",
            str(sae_folder),
            "--features",
            "2",
            "--dataset-name",
            str(corpus_file),
            "--dtype",
            "float32",
        )
        args += (
            "--total-tokens",
            "3000",
            "--context-size",
            "16",
            "--samples",
            "4",
            "--features-at-once",
            "1",
            "--llm",
            "e",
            "--out",
            str(tmp_path / "o"),
        )
        done = cli("sensitivity", *args, FEATUREINTERP_CONFIG=str(config))
        n = len(server.ledger)
    assert done.returncode == 1 and "write-texts: MalformedReplyError" in done.stderr, done.stderr
    with Journal(tmp_path / "o" / "journal.sqlite") as journal:
        rows = [s for s in journal.stages() if s["stage"] == "write-texts"]
        assert (
            journal.causes()
            and sum(r["estimated"] for r in rows) == sum(r["requests"] for r in rows) == n - 1
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sae-names", "py_4k_btopk_s9"], "'s9' is no number"),
        (["--features", "100000"], "only"),
        (["--samples", "0"], "n_texts = 0"),
        (["--n-top-ex-for-generation", "0", "--n-iw-ex-for-generation", "0"], "at least one example"),
        (["--dataset-name", "/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    change: list[str], message: str, tmp_path: Path, subject_folder: Path, sae_folder: Path, corpus_file: Path
):
    args = {
        "--model": str(subject_folder),
        "--sae-names": str(sae_folder),
        "--features": "2",
        "--dataset-name": str(corpus_file),
        "--total-tokens": "2000",
        "--context-size": "16",
    }
    args |= dict(zip(change[::2], change[1::2], strict=True))
    flat = [x for pair in args.items() for x in pair]
    with endpoint(writes) as server:
        done = cli(
            "sensitivity", *flat, "--base-url", server.url, "--llm-model", "m", "--out", str(tmp_path / "o")
        )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
