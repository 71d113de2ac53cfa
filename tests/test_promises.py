"""What a job promises: its own limits and settings, an exit code that is true, bugs that stop it, and memory
that does not grow.
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import test_sensitivity
import typer
from endpoint import completion, endpoint, play
from test_cli import cli, refused
from test_jobs import records, run  # noqa: F401 (a fixture)
from test_trials import answers

import featureinterp
import featureinterp as fi
from featureinterp.api import job_in
from featureinterp.cli.endpoint import endpoint_of
from featureinterp.cli.main import app
from featureinterp.domain.record import FeatureRecord
from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError
from featureinterp.falsification.sensitivity import FeatureSensitivity
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.spec import changed, make_job
from featureinterp.llm.config import Endpoint, load_config
from featureinterp.llm.prices import Price
from featureinterp.reports.export import export_results
from featureinterp.reports.render import read_results, write_report, write_results
from featureinterp.reports.sensitivity import write_sensitivity
from featureinterp.sampling.files import write_records


@pytest.fixture
def copied(tmp_path: Path, run_folder: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def run_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue("run"))


def test_a_verb_without_options_is_the_job_file(copied: Path, subject_folder: Path, tmp_path: Path):
    with endpoint(answers) as server:
        file = tmp_path / "job.toml"
        file.write_text(
            f"run = {str(copied)!r}\nfeatures = 'random:2'\nsimulator = 'lexical'\nstages = ['explain', "
            "'simulate']\n"
            f"model = {str(subject_folder)!r}\nsubject_device = 'cpu'\n[budget]\nusd = "
            "2.5\n[trial]\nn_texts = 5\nrounds = 1\n"
            "[plan]\nn_test = 3\nn_valid = 2\nnegatives = ['random']\nfeatures_at_once = 2\n"
            "[steering]\ndoses = [1.0]\nopenings = ['We']\nn_random = 1\nmax_tokens = 4\n"
            f"[llm]\nbase_url = {server.url!r}\nmodel = 'm'\nconcurrency = 3\nprice = {{ input = 1, output "
            f"= 1 }}\n"
        )
        assert cli("run", str(file)).returncode == 0
        before = job_in(copied)
        for verb in ("falsify", "steer"):
            done = cli(verb, str(copied))
            assert done.returncode == 0, done.stderr
            job = job_in(copied)
            assert verb in job.stages
            for name in type(job).model_fields:
                assert name == "stages" or getattr(job, name) == getattr(before, name), name
        done = cli("falsify", str(copied), "--texts", "4", "--max-minutes", "9", "--concurrency", "7")
        assert done.returncode == 0, done.stderr
        job = job_in(copied)
        assert job.trial == dataclasses.replace(before.trial, n_texts=4) and job.steering == before.steering
        assert job.budget == fi.Budget(2.5, minutes=9) and job.plan == before.plan
        assert isinstance(job.llm, Endpoint) and isinstance(before.llm, Endpoint)
        assert job.llm == dataclasses.replace(before.llm, concurrency=7)
        assert not server.paid_twice()


def test_options_change_the_endpoint_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "c.toml").write_text(
        '[endpoints.paid]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "a"\nrpm = 500\nprice = { input = '
        "1, output = 2 }\n"
    )
    monkeypatch.setenv("FEATUREINTERP_CONFIG", str(tmp_path / "c.toml"))
    paid = load_config().endpoint("paid")
    assert endpoint_of("paid", None) == "paid" and endpoint_of(None, None) is None
    changes: dict[str, Any] = {
        "concurrency": 3,
        "rpm": 7,
        "tpm": 8,
        "timeout_s": 9.0,
        "max_attempts": 2,
        "api_key_env": "KEY",
    }
    assert endpoint_of("paid", None, **changes) == dataclasses.replace(paid, **changes)
    other = endpoint_of("paid", None, model="b")
    assert isinstance(other, Endpoint) and (other.model, other.rpm, other.price) == ("b", 500, None)
    assert endpoint_of(None, None, job="paid", rpm=3) == dataclasses.replace(paid, rpm=3)
    assert endpoint_of(None, None, job=paid) == paid and endpoint_of(
        None, "http://h/v1", job=paid, model="c"
    ) == Endpoint("http://h/v1", "c")
    assert endpoint_of(None, None, concurrency=2) == Endpoint(concurrency=2)
    for options in ({"model": "x"}, {"api_key_env": "X"}):
        with pytest.raises(InputError, match="--base-url or --llm"):
            endpoint_of(None, None, **options)


def test_devices_have_names_of_their_own_and_the_old_one_means_both(tmp_path: Path):
    job = make_job(run=tmp_path, device="cpu")
    assert (job.subject_device, job.simulator_device) == ("cpu", "cpu")
    job = make_job(run=tmp_path, device="cpu", simulator_device="cuda")
    assert (job.subject_device, job.simulator_device) == ("cpu", "cuda")
    assert changed(job, device="mps").subject_device == changed(job, device="mps").simulator_device == "mps"
    assert (
        fi.Plan(concurrency=3).features_at_once
        == 3
        == make_job(run=tmp_path, plan={"concurrency": 3}).plan.features_at_once
    )
    assert dataclasses.replace(fi.Plan(concurrency=3), features_at_once=2) == fi.Plan(features_at_once=2)
    assert dataclasses.replace(fi.Plan(concurrency=3), n_test=2).concurrency == 3
    assert fi.SensitivityPlan(concurrency=3).features_at_once == 3
    with pytest.raises(InputError, match="n_text"):
        changed(job, trial={"n_text": 3})


def test_a_job_with_gaps_ends_with_1_and_asks_for_nothing_that_was_answered(copied: Path, tmp_path: Path):
    """An answer that cannot be used leaves a gap; the same command asks nothing, and another one asks for it
    again.
    """
    unusable, down = True, False

    def answer(body: dict[str, Any]) -> Any:
        if "response_format" in body:
            return play(body)
        if down:
            return 400, {}, {"error": {"message": "not now"}}
        return completion("perhaps") if unusable and "2" in str(body["messages"]) else play(body)

    args = (
        "explain",
        str(copied),
        "--features",
        "random:3",
        "--simulator",
        "lexical",
        "--negatives",
        "random",
        "--n-test",
        "3",
    )
    with endpoint(answer) as server:
        options = (*args, "--base-url", server.url, "--llm-model", "m")
        first = cli(*options)
        last = [line for line in first.stderr.splitlines() if line][-1]
        assert first.returncode == 1 and "3 features failed and" in last and "--retry-failed" in last, (
            first.stderr
        )
        asked = len(server.ledger)
        again = cli(*options)
        assert (
            again.returncode == 1
            and len(server.ledger) == asked
            and [line for line in again.stderr.splitlines() if line][-1] == last
        )
        unusable = False
        assert cli(*options).returncode == 1 and len(server.ledger) == asked
        mended = cli(*options, "--retry-failed", "--json")
        assert mended.returncode == 0 and len(server.ledger) > asked, mended.stderr
        found = json.loads(mended.stdout)
        assert (found["n_failed"], found["n_partial"]) == (0, 0)
        asked, down = len(server.ledger), True
        assert cli(*options).returncode == 0 and len(server.ledger) == asked, (
            "exit code 0: nothing is left to ask"
        )


class Broken:
    settings = {"kind": "broken"}

    async def simulate(self, explanation: object, windows: object) -> list[Any]:
        raise KeyError("a bug")


def test_a_bug_stops_the_run_as_it_is(tmp_path: Path, records: list[FeatureRecord]):  # noqa: F811
    with pytest.raises(KeyError, match="a bug") as raised:
        run(tmp_path, records, lambda _: '{"explanation": "x"}', sim=Broken())
    assert any(frame.name == "simulate" for frame in raised.traceback)
    with Journal(next(tmp_path.rglob("*.sqlite"))) as journal:
        assert not [s for s in journal.stages() if s["status"] == "failed"]
        last = journal.last_run()
        assert last is not None and last["outcome"] == "KeyError"


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(o) is kind for o in gc.get_objects())


class Counted:
    """Results or records that are made when they are asked for; ``most``: how many were alive at once."""

    def __init__(self, one: Any, n: int) -> None:
        self.one, self.n, self.most, self.before = one, n, 0, alive(type(one))

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.n):
            if number % 10 == 9:
                self.most = max(self.most, alive(type(self.one)) - self.before)
            yield dataclasses.replace(self.one, scale=float(number + 1))


def test_reports_tables_and_records_hold_few_features_at_a_time(tmp_path: Path, records: list[FeatureRecord]):  # noqa: F811
    first, _, _ = run(tmp_path, records)
    results, n = Counted(first[0], 60), 60
    about = {"title": "t", "subtitle": "s", "facts": {}}
    write_results(tmp_path, results, about)
    write_report(tmp_path / "a.html", results, about)  # type: ignore[arg-type]
    assert 0 < results.most <= 4
    stored, _ = read_results(tmp_path)
    before = alive(FeatureResult)
    most = 0
    for number, result in enumerate(stored):
        assert result.scale == number + 1
        most = max(most, alive(FeatureResult) - before) if number % 10 == 9 else most
    assert (
        len(stored) == n
        and 0 < most <= 3
        and stored[-1].scale == n
        and [r.scale for r in stored[1:3]] == [2, 3]
    )
    write_report(tmp_path / "b.html", stored, about)
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    for to in ("csv", "jsonl", "parquet"):
        assert export_results(tmp_path, to)[1] == n
    made = Counted(records[0], 60)
    assert write_records(tmp_path / "r.jsonl", made) == n and 0 < made.most <= 4
    assert [json.loads(line)["scale"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == list(
        range(1, n + 1)
    )


def test_sensitivity_holds_few_features_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While texts are written, while they are read, in the tables, and in what is given back."""
    n, before, most = 60, alive(FeatureSensitivity), {"written": 0, "read": 0, "tables": 0, "back": 0}
    monkeypatch.setattr(test_sensitivity.WordActivator, "WORDS", dict.fromkeys(range(n), "war"))

    def look(when: str, number: int) -> None:
        if number % 10 == 9:
            most[when] = max(most[when], alive(FeatureSensitivity) - before)

    def examples(features: Iterable[int]) -> Iterator[FeatureSensitivity]:
        for i in features:
            yield dataclasses.replace(test_sensitivity.feature(i), scale=float(i + 1))
            look("written", i)

    def watched(when: str, features: Iterable[FeatureSensitivity]) -> Iterator[FeatureSensitivity]:
        for i, found in enumerate(features):
            assert found.scale == i + 1 and found.generated_sensitivity().value == 0.75
            look(when, i)
            yield found

    made, _, _ = test_sensitivity.job(tmp_path, test_sensitivity.good)
    made.on_feature = lambda _, done, total: look("read", done - 1)
    features = anyio.run(made.run, list(range(n)), examples)
    summary = write_sensitivity(tmp_path / "o", watched("tables", features), {"sae_name": "s"}, per_call=4)
    assert summary["n_features"] == summary["mean_sensitivity"]["n"] == n
    assert [f.scale for f in features[1:3]] == [2, 3] and features[-1].control_of == 0
    assert sum(1 for _ in watched("back", features)) == len(features) == n
    assert all(0 < found <= 6 for found in most.values()), most


def test_prices_of_another_model_are_not_taken_for_its_own():
    paid = Endpoint("http://h/v1", "a", price=Price(1, 1))
    found = endpoint_of(None, None, job=paid, model="a")
    assert isinstance(found, Endpoint) and found.price == paid.price


def test_a_service_tells_its_address_as_json(tmp_path: Path):
    assert "--json" in cli("serve", "--help").stdout
    refused(cli("serve", "--runs", str(tmp_path / "nowhere"), "--json"), "nowhere")


CORPUS_VERBS = frozenset({"collect", "extract", "train", "layers", "doctor", "probe", "sensitivity"})
ENDPOINT_VERBS = frozenset({"explain", "falsify", "steer", "sensitivity"})
ROOMS: dict[str, frozenset[str]] = {
    "corpus": CORPUS_VERBS,
    "llm": ENDPOINT_VERBS,
    "explain": ENDPOINT_VERBS - {"sensitivity", "steer"},
    "falsify": ENDPOINT_VERBS,
    "simulate": frozenset({"explain", "falsify"}),
    "training": frozenset({"extract", "train"}),
    "claims": frozenset({"collect", "extract", "train", "layers", "sensitivity", "explain", "run", "demo"}),
}
"""Verbs that the errors of a room are read at, where those of all verbs are not."""
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]+)")
OTHERS = {"--nproc-per-node", "--debug", "--version"}
"""Of another program, or of this one before the verb."""
AT_SOME = {
    "--simulator",
    "--base-url",
    "--llm-model",
    "--concurrency",
    "--held-out",
    "--use-saebench-examples",
}
"""Named only where the verb that was called has them: a stand-in of a model, a client of an endpoint."""
AT_SOME |= {"--replace", "--store-dtype"}


def options_of(command: Any, name: str = "") -> dict[str, set[str]]:
    """Verb → its options, as the program has them."""
    if hasattr(command, "commands"):
        found: dict[str, set[str]] = {}
        for sub, below in command.commands.items():
            found |= options_of(below, f"{name} {sub}".strip())
        return found
    shown = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    others = {other.name for names in command.others.values() for other in names}
    return {name: shown | others | {"--help"}}


def said(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module with the lines that they stand in, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    skipped = {id(s.value) for body in bodies for s in body if isinstance(s, ast.Expr)}
    inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not {id(node)} & (skipped | inside)
        ):
            yield node.lineno, node.value


def advice() -> Iterator[tuple[str, str, frozenset[str], bool]]:
    """(place, option, verbs that must have it, whether all of them) of every option that the source names."""
    verbs = options_of(typer.main.get_command(app))
    package = Path(featureinterp.__file__).parent
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        for line, text in said(path):
            for match in OPTION.finditer(text):
                option, before, after = match[1], text[: match.start()], text[match.end() :]
                named = re.findall(r"featureinterp ([a-z]+(?: [a-z]+)?)", before)[-1:]
                of = re.match(r" (?:of|to) '?([a-z]+)'?", after)
                place = f"{'/'.join(parts)}:{line}"
                if option in OTHERS:
                    continue
                if of and of[1] in verbs:
                    yield place, option, frozenset({of[1]}), True
                elif named and (
                    verb := next((v for v in (named[0], named[0].split()[0]) if v in verbs), None)
                ):
                    yield place, option, frozenset({verb, *after_verbs(before, verbs)}), False
                else:
                    yield (
                        place,
                        option,
                        ROOMS.get(parts[0], frozenset(verbs)),
                        parts[0] in ROOMS and option not in AT_SOME,
                    )


def after_verbs(before: str, verbs: Iterable[str]) -> set[str]:
    """Verbs in quotes that stand before an option."""
    return {v for v in verbs if f"'{v}" in before or f"featureinterp {v}" in before}


def test_options_that_errors_name_exist_where_they_are_read():
    verbs = options_of(typer.main.get_command(app))
    assert len(verbs) > 20 and "--text-field" in verbs["train"] and "--merge" not in verbs["train"]
    wrong, n = [], 0
    for place, option, expected, everywhere in advice():
        n += 1
        lacking = {verb for verb in expected if option not in verbs[verb]}
        if lacking and (everywhere or lacking == expected):
            wrong.append(f"{place}: {option} is no option of {', '.join(sorted(lacking))}")
    assert not wrong, "\n".join(wrong)
    assert n > 60


def test_every_option_of_a_verb_is_in_its_help():
    for verb in ("collect", "train", "sensitivity"):
        shown = cli(verb, "--help").stdout
        named = options_of(typer.main.get_command(app))[verb]
        assert all(option in shown for option in named), verb
