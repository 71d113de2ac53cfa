"""Options that several verbs have, each declared once: its name, type, help and other names.

A verb takes them as annotations (``seed: Seed = 0``) or as a group (``limits: Limits``), which stands for
all of its fields. What an option may say comes from ``domain/choices.py`` and from the registries, as in the
job file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featureinterp.domain.choices import (
    Dtype,
    HolisticMethod,
    Projection,
    StoredDtype,
)
from featureinterp.registry import SIMULATORS, Registry

if TYPE_CHECKING:
    from featureinterp.cli.screen import Screen


def named(registry: Registry[Any], option: str, says: str) -> Any:
    """An option whose value is a name of a registry, also of another package: the help lists this project's
    own, a shell completes all, and one that stands for nothing is refused with those that do."""

    def check(ctx: typer.Context, value: str) -> str:
        return value if ctx.resilient_parsing else registry.check(value)

    def names(incomplete: str) -> list[str]:
        return [name for name in registry.names() if name.startswith(incomplete)]

    own = f"<{'|'.join(registry.own)}|…>"
    return typer.Option(option, metavar=own, help=says, callback=check, autocompletion=names)


DEVICES, LIMITS, TEXT = "Devices", "Limits", "Corpus"

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where the result goes.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Delete what an earlier request left in --out, and start anew. Replies that were paid for stay.",
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Ask again also for what was answered and could not be used. Without it only what got no answer "
        "is asked again.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn at random.")]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that 'collect' wrote.", show_default=False)]
JobFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Folder of a job that explained features, or the run folder above it.",
        show_default=False,
    ),
]

Features = Annotated[
    str, typer.Option("--features", help="Which features: 0:40, 3,17,256, random:20 or alive.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Subject model: an embedded name, a Hugging Face name, or a folder."),
]
Sae = Annotated[
    str | None,
    typer.Option("--sae", help="SAE: 'demo', a name of 'saes list', saelens:RELEASE/ID, or a folder."),
]
Hook = Annotated[
    str | None,
    typer.Option(
        "--hook",
        help="Where the model is read: blocks.N.hook_resid_post, the residual stream after block N, counted "
        "from 0.",
    ),
]
Activations = Annotated[
    Path | None, typer.Option("--activations", help="Folder that 'extract' wrote, or that it will write.")
]
Corpus = Annotated[
    str | None,
    typer.Option(
        "--corpus",
        help="Text: 'sotu', hf:DATASET:SPLIT, a file (text, JSONL, JSON, CSV, TSV, parquet, Arrow), or a "
        "folder of such files.",
        rich_help_panel=TEXT,
    ),
]
TextField = Annotated[
    str | None,
    typer.Option("--text-field", help="Field or column that holds the text.", rich_help_panel=TEXT),
]
DocumentSeparator = Annotated[
    str | None,
    typer.Option(
        "--document-separator",
        help="What stands between documents of a text file: lines, blank-lines, none, or a text.",
        rich_help_panel=TEXT,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        help="About how many tokens of the corpus are read, spread over its documents.",
        rich_help_panel=TEXT,
    ),
]
Window = Annotated[int | None, typer.Option("--window", help="Tokens per window.", rich_help_panel=TEXT)]
HeldOut = Annotated[
    float | None,
    typer.Option(
        "--held-out",
        help="Share of the tokens whose documents are kept for evaluation.",
        rich_help_panel=TEXT,
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        "--labels",
        help="Concepts: a .jsonl file of spans, a .toml file of regular expressions, names of ready "
        "concepts, or ready (all of those).",
    ),
]
CodeDtype = Annotated[StoredDtype, typer.Option("--value-dtype", help="How codes are stored.")]
Holistic = Annotated[
    HolisticMethod | None,
    typer.Option(
        "--holistic",
        help="Add which tokens cause the activations: found exactly, by leaving out each token in turn, or "
        "by the gradient.",
    ),
]
ProjectionOf = Annotated[
    Projection, typer.Option("--projection", help="How windows of the kind projected_similar are projected.")
]
Simulator = Annotated[
    str,
    named(
        SIMULATORS,
        "--simulator",
        "What predicts activations from an explanation: token-wise or all-at-once (a model on this "
        "machine), prompt-logprobs or rated (the endpoint), or lexical (no model).",
    ),
]
NTest = Annotated[
    int | None, typer.Option("--n-test", help="Test windows of each kind that explanations are judged on.")
]
NTexts = Annotated[
    int | None,
    typer.Option(
        "--n-texts",
        help="New texts that a language model writes per feature. falsify: so many that should fire, and as "
        "many near misses.",
    ),
]

ModelDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="What models compute in; auto is what is fast here.", rich_help_panel=DEVICES
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where models run: auto (the GPU when there is one), cpu, cuda or mps. The device of one role "
        "goes before it.",
        rich_help_panel=DEVICES,
    ),
]
SubjectDevice = Annotated[
    str | None,
    typer.Option("--subject-device", help="Where the subject and the SAE run.", rich_help_panel=DEVICES),
]
SimulatorDevice = Annotated[
    str | None,
    typer.Option(
        "--simulator-device",
        help="Where models on this machine run that simulate and judge.",
        rich_help_panel=DEVICES,
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", min=1, help="Tokens per forward pass to begin with.", rich_help_panel=DEVICES
    ),
]

BudgetUsd = Annotated[
    float | None,
    typer.Option("--budget-usd", help="Stop when so many USD are spent.", rich_help_panel=LIMITS),
]
MaxMinutes = Annotated[
    float | None, typer.Option("--max-minutes", help="Stop after so many minutes.", rich_help_panel=LIMITS)
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        help="Requests in flight at most; 16, or what the configuration file says.",
        rich_help_panel=LIMITS,
    ),
]
FeaturesAtOnce = Annotated[
    int | None,
    typer.Option(
        "--features-at-once",
        help="Features that are worked on at once; one when the model is on this machine.",
        rich_help_panel=LIMITS,
    ),
]


@dataclass(frozen=True)
class Reading:
    """Where the model runs that a verb reads text with. ``device`` and its role's own are one thing here."""

    device: Device = None
    subject_device: SubjectDevice = None

    @property
    def subject(self) -> str | None:
        """The device of the subject and the SAE."""
        return self.subject_device or self.device


@dataclass(frozen=True)
class Devices(Reading):
    """Where all models of a job run."""

    simulator_device: SimulatorDevice = None

    @property
    def simulator(self) -> str | None:
        """The device of models that simulate and judge."""
        return self.simulator_device or self.device

    def fields(self) -> dict[str, Any]:
        """The fields of a job that were given."""
        return given(
            device=self.device,
            subject_device=self.subject_device,
            simulator_device=self.simulator_device,
        )


@dataclass(frozen=True)
class Limits:
    """What a run may cost."""

    budget_usd: BudgetUsd = None
    max_minutes: MaxMinutes = None

    def fields(self) -> Mapping[str, float]:
        """What was given, as the fields of a budget."""
        return given(usd=self.budget_usd, minutes=self.max_minutes)


def random_or_named(features: str, screen: Screen) -> int | str:
    """Which features are meant: so many at random, from ``random:20``, or the text that names them. A plain
    number, which elsewhere is one feature, stood for so many at random here, and still does.
    """
    head, _, number = features.partition(":")
    if head == "random" and number.isdecimal():
        return int(number)
    if not features.isdecimal():
        return features
    screen.say(f"--features {features} is read as random:{features}, as it was before: write that")
    return int(features)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
