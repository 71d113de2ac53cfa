"""One name per thing: what every verb is asked with, the names that things had, and what the help shows."""

from __future__ import annotations

import shlex
import sqlite3
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from test_cli import cli, refused
from test_sensitivity import good, run_job
from test_sensitivity import job as sensitivity_job
from typer.core import TyperCommand

import featureinterp as fi
from featureinterp.cli.main import app
from featureinterp.falsification.intervention import Interventions, SteeringSettings
from featureinterp.files import content_key
from featureinterp.jobs.spec import Job, changed, load_job, make_job
from featureinterp.registry import EXPLAINERS, FORMATS, SIMULATORS
from featureinterp.server.forms import Submission


def verbs_in(command: Any, path: tuple[str, ...] = ()) -> dict[str, TyperCommand]:
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    found = {}
    for name, inner in command.commands.items():
        found |= verbs_in(inner, (*path, name))
    return found


VERBS = verbs_in(typer.main.get_command(app))

ASKED = """--llm --base-url --llm-model --api-key-env --effort --extra-body --extra-header --concurrency --rpm
    --tpm --timeout-s --max-attempts --reply-tokens --thinking-tokens"""
BUDGET = "--budget-usd --max-minutes"
JOB = f"{ASKED} {BUDGET} --features-at-once --device --subject-device --simulator-device --dtype"
TEXT = "--corpus --text-field --document-separator"
RECIPE = "--config --set --text-field --document-separator --held-out --store-dtype --dtype"
LIVE = "--device --subject-device"
SHARED = {
    "demo": "--features --seed --max-tokens --n-test --simulator --out --retry-failed --replace",
    "collect": f"--out --model --sae {TEXT} --max-tokens --window {LIVE} --dtype --value-dtype --replace",
    "records": f"--features --out --projection --holistic --model --sae {LIVE} --seed",
    "explain": f"{JOB} --features --holistic --projection --model --sae --simulator --n-test --seed --out "
    "--retry-failed --replace",
    "falsify": f"{JOB} --n-texts --model --sae --retry-failed",
    "steer": f"{JOB} --model --sae --retry-failed",
    "run": f"{JOB} --out --retry-failed --replace",
    "sensitivity": f"{ASKED} {BUDGET} --features-at-once {TEXT} --max-tokens --window --model --sae "
    f"--features --n-texts --seed {LIVE} --dtype --value-dtype --out --retry-failed --replace",
    "probe": f"--labels --out {TEXT} --model {LIVE} --seed",
    "extract": f"{RECIPE} --out --model --hook --corpus --max-tokens --window {LIVE} --replace",
    "train": f"{RECIPE} --out --activations {LIVE} --replace",
    "evaluate": f"--activations --out --model --seed {LIVE}",
    "doctor": f"{TEXT} --model --hook --window --seed {LIVE} --dtype",
    "layers": f"{TEXT} --model --labels --max-tokens --window --out --seed {LIVE} --dtype --replace",
    "export": "--out",
    "report": "--out",
    "llm test": ASKED,
    "status": "",
    "serve": "",
    "verify": "",
    "list": "",
    "llm list": "",
    "models list": "",
    "models fetch": "",
    "models verify": "",
    "saes list": "",
    "saes show": "",
    "saes fetch": "",
}
"""Which of the shared options a verb has, beside --json, which every one has."""

LISTS = {("sensitivity", "--sae")}
"""Options that take several values in one verb, and one in the others."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "--features": {
        "demo": "random:5",
        "records": "0:100",
        "sensitivity": "random:50",
        "explain": "random:10",
    },
    "--out": {"demo": Path("featureinterp-demo"), "sensitivity": Path("sensitivity")},
    "--model": dict.fromkeys(("collect", "sensitivity", "layers"), "smollm2-135m-instruct"),
    "--sae": {"collect": "demo", "sensitivity": ["demo"]},
    "--corpus": dict.fromkeys(("collect", "sensitivity", "layers"), "sotu"),
    "--text-field": dict.fromkeys(("collect", "sensitivity", "doctor", "layers"), "text"),
    "--max-tokens": {"sensitivity": 2_000_000, "layers": 50_000},
    "--window": {"collect": 32, "sensitivity": 128, "layers": 64},
    "--n-test": {"explain": 10},
    "--n-texts": {"sensitivity": 10},
}
"""Where the default is a verb's own, and not None; an option that is not here has one default everywhere."""

BEFORE = """
demo: --features --seed --max-tokens --n-test --simulator --out --retry-failed --replace --json
collect: --out --model --sae --corpus --max-tokens --window --max-per-document --text-field
    --document-separator --device --dtype --value-dtype --batch-tokens --replace --json
records: --features --out --embedder --count --projection --holistic --model --sae --device --seed
    --json
explain: --features --explainer --style --rule-cap --holistic --few-shot --negatives --projection
    --tree-depth --model --sae --simulator --simulator-model --simulator-chat --no-simulator-chat
    --device --subject-device --simulator-device --dtype --llm --base-url --llm-model --api-key-env
    --concurrency --features-at-once --rpm --tpm --timeout-s --max-attempts --reply-tokens
    --thinking-tokens --effort --extra-body --extra-header --budget-usd --max-minutes --n-test
    --questions --no-questions --seed --out --retry-failed --replace --json
falsify: --texts --rounds --fires-above --llm --base-url --llm-model --api-key-env --concurrency --rpm
    --tpm --timeout-s --max-attempts --reply-tokens --thinking-tokens --effort --extra-body
    --extra-header --features-at-once --device --subject-device --simulator-device --budget-usd
    --max-minutes --retry-failed --json
steer: --doses --opening --random-directions --max-tokens --temperature --model --sae --llm --base-url
    --llm-model --api-key-env --concurrency --rpm --tpm --timeout-s --max-attempts --reply-tokens
    --thinking-tokens --effort --extra-body --extra-header --features-at-once --device --subject-device
    --simulator-device --budget-usd --max-minutes --retry-failed --json
probe: --labels --out --dense --no-dense --decoders --no-decoders --test-fraction --min-auroc --min-f1
    --alpha --shifts --corpus --text-field --document-separator --model --device --seed --json
sensitivity: --model --sae-names --features --dataset-name --text-field --document-separator
    --total-tokens --context-size --n-top-ex-for-generation --n-iw-ex-for-generation --samples
    --num-per-call --use-saebench-examples --llm --base-url --llm-model --api-key-env --concurrency
    --max-workers --features-at-once --rpm --tpm --timeout-s --max-attempts --reply-tokens
    --thinking-tokens --effort --extra-body --extra-header --budget-usd --max-minutes --seed --device
    --dtype --output-path --out --retry-failed --value-dtype --replace --verbose --json
extract: --out --config --model --hook --corpus --dtype --text-field --document-separator --max-tokens
    --window --held-out --store-dtype --part --parts --merge --set --device --replace --json
train: --out --config --activations --dtype --text-field --document-separator --held-out --store-dtype
    --architecture --d-sae --k --samples --lr --online --set --device --replace --json
evaluate: --activations --out --model --max-rows --pca --ce-windows --seed --device --json
doctor: --model --hook --corpus --text-field --document-separator --window --load-model --no-model
    --machine --bench --seed --device --dtype --json
layers: --model --corpus --blocks --labels --max-tokens --window --text-field --document-separator --out
    --seed --device --dtype --replace --json
run: --dry-run --budget-usd --max-minutes --retry-failed --replace --json
status: --json
export: --to --out --json
serve: --runs --jobs --host --port --token-env --endpoint --simulator-model --queue --parallel
    --min-free-mb --json
report: --out --json
verify: --json
models list: --json
models fetch: --json
models verify: --json
saes list: --json
saes show: --json
saes fetch: --json
llm list: --json
llm test: --json
"""
"""The options of version 0.1.0, by verb."""

OTHER_NAMES = [
    ("falsify", "--texts", "--n-texts", "12", True),
    ("steer", "--max-tokens", "--tokens-per-text", "9", True),
    ("serve", "--endpoint", "--allow-llm", "paid", True),
    ("serve", "--simulator-model", "--allow-simulator-model", "some", True),
    ("sensitivity", "--sae-names", "--sae", "py_4k_btopk_s0", False),
    ("sensitivity", "--dataset-name", "--corpus", "text.txt", False),
    ("sensitivity", "--total-tokens", "--max-tokens", "77", False),
    ("sensitivity", "--context-size", "--window", "16", False),
    ("sensitivity", "--n-top-ex-for-generation", "--n-top", "3", False),
    ("sensitivity", "--n-iw-ex-for-generation", "--n-weighted", "4", False),
    ("sensitivity", "--samples", "--n-texts", "6", False),
    ("sensitivity", "--num-per-call", "--texts-per-call", "2", False),
    ("sensitivity", "--max-workers", "--concurrency", "5", False),
    ("sensitivity", "--output-path", "--out", "there", False),
]
NEEDED = {"serve": ["--runs", "r"], "falsify": ["RUN"], "steer": ["RUN"]}


def options_of(verb: str) -> dict[str, Any]:
    return {p.opts[0]: p for p in VERBS[verb].params if p.param_type_name == "option"}


def parsed(verb: str, args: list[str]) -> dict[str, Any]:
    return VERBS[verb].make_context(verb, list(args)).params


def test_every_verb_has_the_shared_options_that_make_sense_there():
    shared = {name for options in SHARED.values() for name in options.split()}
    assert set(SHARED) == set(VERBS)
    for verb, expected in SHARED.items():
        assert "--json" in options_of(verb), verb
        assert set(options_of(verb)) & shared == set(expected.split()), verb


def test_an_option_is_the_same_in_every_verb():
    verbs_of: dict[str, list[str]] = {}
    for verb in VERBS:
        for name in options_of(verb):
            verbs_of.setdefault(name, []).append(verb)
    for name, verbs in verbs_of.items():
        seen = {}
        for verb in verbs:
            option = options_of(verb)[name]
            default = DEFAULTS.get(name, {}).get(verb)
            if name in DEFAULTS:
                assert option.default == default, (name, verb)
            if (verb, name) in LISTS:
                continue
            kind = option.type_descriptor.annotation
            own = None if name in DEFAULTS else repr(option.default)
            seen[verb] = (option.help, str(kind), option.multiple, option.is_flag, option.metavar, own)
        assert len(set(seen.values())) == 1, (name, seen)


def test_every_option_of_before_is_still_taken():
    for line in BEFORE.replace("\n    ", " ").strip().splitlines():
        verb, _, names = line.partition(": ")
        command = VERBS[verb]
        parser = command.make_parser(command.context_class(command))
        for name in names.split():
            assert name in parser._long_opt, (verb, name)


@pytest.mark.parametrize(("verb", "other", "present", "value", "former"), OTHER_NAMES)
def test_another_name_is_the_same_option_and_a_former_one_says_the_present(
    verb: str, other: str, present: str, value: str, former: bool, capsys: pytest.CaptureFixture[str]
):
    needed = NEEDED.get(verb, [])
    expected = parsed(verb, [*needed, present, value])
    assert expected != parsed(verb, needed) and capsys.readouterr().err == ""
    assert parsed(verb, [*needed, other, value]) == expected
    said = capsys.readouterr().err
    assert said == (
        f"featureinterp: {other} is now {present}; the former name still works\n" if former else ""
    )
    assert parsed(verb, [*needed, f"{other}={value}"]) == expected
    shown = cli(*verb.split(), "--help").stdout
    assert (f"[also: {other}]" in " ".join(shown.split())) is not former


def test_the_docs_list_every_other_name():
    page = (Path(fi.__file__).parents[1] / "docs" / "vocabulary.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    for verb, other, present, _, former in OTHER_NAMES:
        assert any(f"`{other}`" in row[-3] and f"`{present}`" in row[-2] for row in rows), (verb, other)
        assert not former or any(f"`{verb}`" in row[1] and f"`{other}`" in row[2] for row in rows), other


def test_a_name_that_is_a_value_says_nothing(capsys: pytest.CaptureFixture[str]):
    assert parsed("models fetch", ["--", "--texts"])["names"] == ["--texts"]
    assert capsys.readouterr().err == ""


def test_choices_are_those_of_the_job_and_of_the_service():
    options = options_of("explain")
    for name in ("style", "holistic", "simulator_dtype"):
        annotation = Job.model_fields[name].annotation
        kinds = (annotation, *get_args(annotation))
        named = next(get_args(k) for k in kinds if get_args(k) and isinstance(get_args(k)[0], str))
        option = options["--dtype" if name == "simulator_dtype" else f"--{name.replace('_', '-')}"]
        assert tuple(option.type_descriptor.choices) == named
    for option, registry in (
        (options["--explainer"], EXPLAINERS),
        (options["--simulator"], SIMULATORS),
        (options_of("demo")["--simulator"], SIMULATORS),
        (options_of("export")["--to"], FORMATS),
    ):
        assert option.metavar == f"<{'|'.join(registry.own)}|…>"
    for field in set(Submission.model_fields) - {"run", "stages"}:
        assert f"--{field.replace('_', '-')}" in options, field


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("explain RUN --simulator ", list(SIMULATORS.own)),
        ("layers --dtype b", ["bfloat16"]),
        ("falsify RUN --n", ["--n-texts"]),
        ("falsify RUN --te", []),
    ],
)
def test_a_shell_completes_choices_and_present_names(words: str, offered: list[str]):
    line = f"featureinterp {words}"
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    shown = cli(_FEATUREINTERP_COMPLETE="complete_bash", **env).stdout
    assert shown.split() == offered


def test_misuse_is_one_sentence_that_says_what_to_do():
    for args, words in (
        (("explain", "RUN", "--simulator", "best"), ("simulator", "'best'", "lexical")),
        (("explain", "RUN", "--n-test", "many"), ("'--n-test'", "'many'")),
        (("explain", "RUN", "--simulater", "x"), ("--simulater", "--simulator")),
        (("collect",), ("'--out'", "featureinterp collect --help")),
        (("explain",), ("RUN", "featureinterp explain --help")),
        (("explain", "RUN", "more"), ("(more)",)),
        (("explian", "RUN"), ("explian", "explain")),
        (("export", "RUN", "--to", "xlsx"), ("'xlsx'", "parquet, csv, jsonl")),
        (("llm", "test"), ("--base-url",)),
        (("llm", "test", "paid", "--llm", "other"), ("paid", "other")),
        (("demo", "--features", "0:4"), ("0:4", "random:5")),
    ):
        refused(cli(*args, FEATUREINTERP_CONFIG="/nowhere"), *words)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_is_taken_and_breaks_no_name(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "100")
    shown = cli(*verb.split(), "--help").stdout
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line.endswith("-")]
    for option in VERBS[verb].params:
        assert option.help and option.help.endswith((".", ";")), (verb, option.name)
    _, _, rest = shown.partition("  Example: featureinterp ")
    example = " ".join(rest.partition("\n\n")[0].split())
    assert example.startswith(verb), example
    parsed(verb, shlex.split(example.removeprefix(verb)))
    assert capsys.readouterr().err == ""


def test_a_number_of_features_is_so_many_at_random_where_it_was():
    from featureinterp.cli.options import random_or_named
    from featureinterp.cli.screen import Screen

    screen = Screen()
    assert [random_or_named(text, screen) for text in ("random:7", "7", "3,7", "0:7", "alive")] == [
        *(7, 7),
        *("3,7", "0:7", "alive"),
    ]


def test_former_fields_are_taken_in_python_and_files(tmp_path: Path):
    plan = fi.SensitivityPlan(samples=3, per_call=2, concurrency=4)
    assert (plan.n_texts, plan.texts_per_call, plan.features_at_once) == (3, 2, 4)
    assert (plan.samples, plan.per_call, plan.concurrency) == (3, 2, 4)
    assert fi.SensitivityPlan(3, 2) == fi.SensitivityPlan(n_texts=3, texts_per_call=2)
    steering = SteeringSettings(max_tokens=5)
    assert steering.tokens_per_text == steering.max_tokens == 5
    (tmp_path / "job.toml").write_text(
        'run = "R"\ndevice = "cpu"\ndtype = "float32"\n[plan]\nconcurrency = 3\n[steering]\nmax_tokens = 5\n'
    )
    job = load_job(tmp_path / "job.toml")
    assert (job.subject_device, job.simulator_device, job.simulator_dtype) == ("cpu", "cpu", "float32")
    assert job.plan.features_at_once == 3 and job.steering.tokens_per_text == 5
    assert make_job(run="R", dtype="float32", simulator_dtype="bfloat16").simulator_dtype == "bfloat16"
    assert changed(job, dtype="bfloat16").simulator_dtype == "bfloat16"
    assert changed(job, steering={"max_tokens": 6}).steering.tokens_per_text == 6
    assert changed(job, steering={"temperature": 0.1}).steering.tokens_per_text == 5
    written = job.model_dump(mode="json")
    written["steering"]["max_tokens"] = written["steering"].pop("tokens_per_text")
    assert Job.model_validate(written) == job


def test_keys_of_the_journal_are_those_of_before(tmp_path: Path):
    """These keys were written by version 0.1.0, with the same settings under their former names."""

    class Writes:
        settings = {"kind": "s"}

    steering = SteeringSettings(doses=(0.0, 1.0), tokens_per_text=5)
    made: Any = Interventions(Writes(), None, None, steering, seed=2)  # type: ignore[arg-type]
    assert content_key(made.settings) == "e82920966a26fb1b11e0e0a2e65abccb"
    sensitive, _, _ = sensitivity_job(tmp_path, good)
    run_job(sensitive)
    with sqlite3.connect(tmp_path / "j.sqlite") as journal:
        rows = journal.execute("SELECT stage, feature, key FROM results ORDER BY stage, feature").fetchall()
    assert rows == [
        ("read-texts", 1, "c1c275b34111835ed43e6d21a310951d"),
        ("read-texts", 2, "e5bbd0020661e0ea44b43410a96502ee"),
        ("write-texts", 1, "8e7e894b90dae1b0533d831e6d0ad636"),
        ("write-texts", 2, "cb42f4b8f0c0fa861d5b53605eacad30"),
    ]
