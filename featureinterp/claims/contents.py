"""What folders may hold: one value per kind of content, with the files and folders that are of it."""

from __future__ import annotations

from dataclasses import dataclass

WINDOWS = "windows"
"""The one part that contents of two kinds share, when both are of the same windows."""
WINDOWS_ASKED = ("corpus", "window", "tokenizer")
"""What of a request its windows depend on."""


@dataclass(frozen=True, slots=True)
class Content:
    """A kind of content. ``name``: of its entry; ``words``: in a sentence; ``parts``: the files and folders
    that are of it; ``mark``: one that says that it is there when no entry does; ``asks``: names that requests
    of this kind have and those of the kinds before it have not."""

    name: str
    words: str
    parts: tuple[str, ...]
    mark: str = ""
    asks: frozenset[str] = frozenset({""})


_JOURNAL = ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm")
CODES = Content(
    "codes",
    "codes",
    ("codes", WINDOWS, "embeddings", "dense", "records.jsonl", "records.sums.json"),
    "codes/codes.json",
    frozenset({"SAE"}),
)
JOB = Content(
    "job",
    "a job",
    ("job.json", "resolved.json", *_JOURNAL, "results.jsonl", "about.json", "report.html"),
    "job.json",
    frozenset({"codes"}),
)
"""What a job's folder holds that is of its codes; replies are of their requests."""
TRAINING = Content(
    "training",
    "a training run",
    (
        *("recipe.toml", "run.json", "metrics.json", "checkpoint.safetensors", "log.jsonl"),
        *("sae", "saelens", "training.html", "figures"),
    ),
    "run.json",
    frozenset({"sae", "training"}),
)
"""What a run's folder holds beside its activations, which are claimed on their own."""
LAYERS = Content(
    "layers",
    "a comparison of layers",
    ("layers.csv", "layers.json", "layers.png", "layers.svg"),
    "layers.json",
    frozenset({"labels", "blocks"}),
)
EXTRACTION = Content(
    "extraction",
    "an extraction",
    ("train", "test", WINDOWS, "extracting.json"),
    "train/metadata.json",
    frozenset(WINDOWS_ASKED),
)
SENSITIVITY = Content("sensitivity", "a measurement of sensitivity", (*_JOURNAL, "sensitivity.png"))
"""Its codes are claimed below, per SAE; all else is of its journal's keys."""
EVALUATION = Content("evaluation", "an evaluation", ("metrics.json",))
_FEATURES = ("features.parquet", "features.csv")
STUDY = Content(
    "study",
    "a study by labels",
    (
        *("study.json", "labels.npz", *_FEATURES, "concepts.parquet", "concepts.csv"),
        *("concept_features.parquet", "concept_features.csv", "probe.html", "concepts.png", "concepts.svg"),
    ),
    "study.json",
)
TABLE = Content("table", "an exported table", (*_FEATURES, "features.jsonl"))
CONTENTS = (CODES, JOB, TRAINING, LAYERS, EXTRACTION, SENSITIVITY, EVALUATION, STUDY, TABLE)
