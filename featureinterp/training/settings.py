"""What a run is made of: one TOML file, every key checked before anything is done.

[subject]
model = "smollm2-135m-instruct"
hook = "blocks.14.hook_resid_post"

[corpus]
name = "sotu"
max_tokens = 1_500_000

[sae]
architecture = "topk"
d_sae = 4608
k = 32

[training]
samples = 3_600_000
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic

from featureinterp.domain.choices import Architecture, Dtype, StoredDtype
from featureinterp.errors import InputError, UnknownNameError
from featureinterp.files import UnparsedError, parse_toml
from featureinterp.resources import data_folder
from featureinterp.validation import LARGEST_SEED, first_problem

BY_COUNT = ("topk", "batch_topk", "matryoshka_batch_topk")
"""Architectures whose number of codes per token is set, instead of a penalty on it."""
TINY = 1e-9


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class SubjectTable(_Table):
    """The model whose activations are learned."""

    model: str = "smollm2-135m-instruct"
    """An embedded name, a Hugging Face name, or a folder."""
    hook: str = "blocks.14.hook_resid_post"
    """The residual stream after a block, counted from 0."""
    dtype: Dtype = "auto"
    """What the model runs in; auto: bfloat16 where the device has it, else float32. A run records what was
    chosen.
    """


class CorpusTable(_Table):
    """The text."""

    name: str = "sotu"
    """As for 'collect --corpus'."""
    text_field: str = "text"
    """Field or column that holds the text."""
    document_separator: str | None = None
    """As for 'collect --document-separator'."""
    window: int = pydantic.Field(default=64, ge=2, le=8192)
    """Tokens per window."""
    min_window: int = pydantic.Field(default=8, ge=1)
    """A shorter rest of a document is dropped."""
    max_tokens: int | None = pydantic.Field(default=None, ge=2)
    """About how many tokens, spread over the documents; all when not given."""
    max_per_document: int | None = pydantic.Field(default=None, ge=1)
    """Windows of one document at most."""
    held_out: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Share of the tokens whose documents are kept for evaluation."""


class StoreTable(_Table):
    """Where activations are kept."""

    folder: Path | None = None
    """A folder that 'extract' wrote, or will; RUN/activations when not given."""
    dtype: StoredDtype = "float16"
    """How they are stored."""
    shuffle: bool = True
    """Windows are read in random order, so that every shard is a sample of the whole corpus."""
    shard_rows: int | None = pydantic.Field(default=None, ge=1)
    """Rows per shard; 64 MiB of them when not given."""


class SaeTable(_Table):
    """The dictionary."""

    architecture: Architecture = "topk"
    d_sae: int | None = pydantic.Field(default=None, ge=2, le=1 << 24, strict=True)
    """Number of features; ``expansion`` times the width when not given."""
    expansion: float = pydantic.Field(default=8, gt=0)
    k: int = pydantic.Field(default=32, ge=1, strict=True)
    """Codes per token: kept (TopK), on average (BatchTopK, Matryoshka), aimed at (JumpReLU). At most as many
    as features.
    """
    prefixes: tuple[float, ...] = (0.03125, 0.09375, 0.21875, 0.46875, 1.0)
    """Matryoshka: shares of the dictionary that reconstruct on their own, ascending, the last 1."""
    normalize: Literal["none", "global", "token"] = "global"
    """Of the input: none; one factor that gives the centred activations unit variance per dimension, folded
    into the weights at export; or each token by its own mean and deviation, which the exported SAE does too.
    """
    penalty: float | None = pydantic.Field(default=None, ge=0)
    """Weight of sparsity: of the L1 norm (ReLU, gated; 0.1 when not given), of (L0 / k − 1)² (JumpReLU; 1
    when not given).
    """
    penalty_warmup: float = pydantic.Field(default=0.1, ge=0, le=1)
    """Share of the steps over which it grows from 0."""
    bandwidth: float = pydantic.Field(default=0.1, gt=0)
    """JumpReLU: width of the kernel through which thresholds learn, in units of normalised activations per
    dimension.
    """
    aux_k: int | None = pydantic.Field(default=None, ge=0)
    """Dead features that reconstruct what the others leave over; half the width when not given, 0: none."""
    aux_coefficient: float = pydantic.Field(default=0.03125, ge=0)
    """Weight of that."""
    dead_after: int = pydantic.Field(default=10_000_000, ge=1)
    """A feature is dead that was silent for so many tokens."""
    threshold_decay: float = pydantic.Field(default=0.98, ge=0, lt=1)
    """BatchTopK: of the running mean of the smallest kept code, which becomes the threshold."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """How the weights are saved; what is evaluated is what is saved."""

    @pydantic.field_validator("prefixes")
    @classmethod
    def _ascend(cls, prefixes: tuple[float, ...]) -> tuple[float, ...]:
        if (
            not prefixes
            or prefixes[0] <= 0
            or abs(prefixes[-1] - 1) > TINY
            or any(b <= a for a, b in pairwise(prefixes))
        ):
            raise ValueError("they must ascend from above 0 to 1")
        return prefixes

    @pydantic.model_validator(mode="after")
    def _fits(self) -> SaeTable:
        if self.d_sae is not None and self._too_many(self.d_sae):
            raise ValueError(
                f"k ({self.k}) is above d_sae ({self.d_sae}): a token has at most as many codes as there "
                "are features"
            )
        return self

    def _too_many(self, d_sae: int) -> bool:
        return self.architecture in (*BY_COUNT, "jumprelu") and self.k > d_sae

    def width(self, d_in: int) -> int:
        """The number of features for activations of width ``d_in``. Raises ``InputError`` when it is below
        ``k``.
        """
        found = self.d_sae or max(2, round(self.expansion * d_in))
        if self._too_many(found):
            raise InputError(
                f"sae.k = {self.k} is above the {found} features that sae.expansion = {self.expansion:g} "
                f"gives a model of width {d_in}: "
                "lower k or raise the expansion",
            )
        return found

    @property
    def penalty_or_default(self) -> float:
        """The weight of sparsity."""
        if self.penalty is not None:
            return self.penalty
        return 1.0 if self.architecture == "jumprelu" else 0.1


class TrainingTable(_Table):
    """How it is trained."""

    samples: int | None = pydantic.Field(default=None, ge=1)
    """Tokens in all; ``epochs`` passes over the store when not given."""
    epochs: float = pydantic.Field(default=3, gt=0)
    batch: int = pydantic.Field(default=4096, ge=1)
    """Tokens per step, over all processes."""
    lr: float = pydantic.Field(default=3e-4, gt=0)
    """Learning rate after the warm-up."""
    lr_end: float = pydantic.Field(default=0.0, ge=0)
    """Learning rate at the last step."""
    warmup: int = pydantic.Field(default=100, ge=0)
    """Steps of a linear rise of the learning rate."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls from the end of the warm-up to the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    clip: float = pydantic.Field(default=1.0, ge=0)
    """The gradient's norm is cut to this; 0: never."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the large products; weights and their updates are always float32."""
    mix: int = pydantic.Field(default=10, ge=1)
    """Shards whose rows are shuffled together."""
    presample: int = pydantic.Field(default=8, ge=1)
    """Shards from which the sample for the pre-bias and the normalisation is drawn."""
    presample_rows: int = pydantic.Field(default=50_000, ge=2)
    """Rows of that sample."""
    online: bool = False
    """Train straight from the model, without a store."""
    buffer: int = pydantic.Field(default=131_072, ge=1)
    """Online: rows that are shuffled together."""
    batch_tokens: int = pydantic.Field(default=2048, ge=1)
    """Tokens per forward pass of the subject."""
    log_every: int = pydantic.Field(default=50, ge=1)
    """Steps per line of the log."""
    checkpoint_every: int = pydantic.Field(default=500, ge=1)
    """Steps between checkpoints."""
    seed: int = pydantic.Field(default=0, ge=0, le=LARGEST_SEED)

    @pydantic.model_validator(mode="after")
    def _falls(self) -> TrainingTable:
        if self.lr_end > self.lr:
            raise ValueError(f"lr_end ({self.lr_end:g}) is above lr ({self.lr:g})")
        return self


class EvaluationTable(_Table):
    """How it is judged, on documents that were held out."""

    max_rows: int | None = pydantic.Field(default=None, ge=2)
    """Activations; all that are held out when not given."""
    pca: int = pydantic.Field(default=32, ge=1)
    """Components of the PCA that stands beside the SAE."""
    ce_windows: int = pydantic.Field(default=256, ge=0)
    """Windows on which the model reads the reconstruction; 0: none."""


class TrackingTable(_Table):
    """Where the log goes besides the terminal and log.jsonl."""

    to: Literal["none", "wandb", "tensorboard"] = "none"
    """W&B and TensorBoard need the extras of their names."""
    project: str = "featureinterp"
    """W&B: the project."""
    entity: str | None = None
    """W&B: the account; the one that is logged in when not given."""
    name: str | None = None
    """W&B: the run's name; that of its folder when not given."""


class Recipe(_Table):
    """A run, from the model to the verdict."""

    subject: SubjectTable = SubjectTable()
    corpus: CorpusTable = CorpusTable()
    store: StoreTable = StoreTable()
    sae: SaeTable = SaeTable()
    training: TrainingTable = TrainingTable()
    evaluation: EvaluationTable = EvaluationTable()
    tracking: TrackingTable = TrackingTable()

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """With other values: ``{"sae.k": 64}``. Raises ``InputError``."""
        tables: dict[str, Any] = self.model_dump(exclude_unset=True)
        for key, value in changes.items():
            table, _, name = key.partition(".")
            if not name:
                raise InputError(f"{key!r} names no setting: write TABLE.KEY, such as sae.k")
            tables.setdefault(table, {})[name] = value
        return make_recipe(tables)


def make_recipe(tables: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Raises ``InputError`` that names the first mistake, and for an unknown key the nearest known one."""
    _check_keys(tables, where)
    try:
        return Recipe.model_validate(tables)
    except pydantic.ValidationError as error:
        raise InputError(f"{where} has a mistake: {first_problem(error)}") from error


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by the name of an embedded one (``demo``) or from a TOML file; a relative ``store.folder``
    starts from the file's folder.
    """
    path = data_folder() / "recipes" / f"{name}.toml" if str(name) in embedded() else Path(name)
    try:
        tables = parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnknownNameError(
            f"there is no recipe {str(name)!r}: give a TOML file, or {' or '.join(embedded())}"
        ) from error
    except (OSError, UnicodeDecodeError, UnparsedError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    recipe = make_recipe(tables, f"the recipe {path}")
    folder = recipe.store.folder
    if folder is not None and not folder.is_absolute():
        recipe = recipe.model_copy(
            update={"store": recipe.store.model_copy(update={"folder": path.parent / folder})}
        )
    return recipe


def embedded() -> list[str]:
    """The recipes that travel with the package."""
    return sorted(p.stem for p in (data_folder() / "recipes").glob("*.toml"))


def recipe_toml(recipe: Recipe) -> str:
    """All settings, as a TOML file that gives the same recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _check_keys(tables: dict[str, Any], where: str) -> None:
    tables_of = {name: field.annotation for name, field in Recipe.model_fields.items()}
    known = {name: list(table.model_fields) for name, table in tables_of.items() if table is not None}
    for table, values in tables.items():
        if table not in known:
            elsewhere = [f"{t}.{table}" for t, keys in known.items() if table in keys]
            raise InputError(
                f"{where} has an unknown {'key' if elsewhere else 'table'} {table!r}: "
                f"{_nearest(table, list(known), elsewhere)}"
            )
        if not isinstance(values, dict):
            raise InputError(f"{where} gives {table} = {values!r}: it is a table, write [{table}]")
        for key in values:
            if key not in known[table]:
                elsewhere = [f"{t}.{key}" for t, keys in known.items() if key in keys]
                raise InputError(
                    f"{where} has an unknown key {table}.{key}: {_nearest(key, known[table], elsewhere)}"
                )


def _nearest(name: str, known: list[str], elsewhere: list[str]) -> str:
    near = elsewhere or get_close_matches(name, known, 1, 0.4)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def value_of(text: str) -> Any:
    """A value as TOML would read it; what is none is a string."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except UnparsedError:
        return text


ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
