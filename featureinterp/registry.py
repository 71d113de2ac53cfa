"""What a name stands for: one registry for each kind of part that has several.

Command line, TOML files, the service and Python look names up here. A package of somebody else's adds its own
by an entry point of the kind's group (``featureinterp.simulators``, …), which is read when a name is not this
project's own, or when the kind is listed; a notebook adds its own by :meth:`Registry.register`.

What a registry holds is whatever makes the part (a class or a function); ``docs/adding.md`` says for each
kind what it is called with. ``traits`` of it say what a job has to know before it makes the part:

asks      it puts questions to the job's language model
local     it runs a transformers model in this process (a simulator)
chat      it has a form for chat models (a simulator)
searches  it simulates on training and validation windows (an explainer, a stage)
causes    it can be shown which tokens cause the activations (an explainer)
null      it also judges another feature's explanation (a stage, a scorer)
live      it runs the subject model (a stage)
fires     windows of the kind fire by their nature (a window kind)
centred   windows of the kind are cut around a token (a window kind)
embeds    the kind needs the windows' embeddings (a window kind)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from featureinterp.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from featureinterp.interfaces import Embedder, Explainer, Layout, Parts, Simulator, Stage, WriteTable

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Entry:
    """A name of this project's own. ``says``: what it is, in one line. ``target``: ``module:object``, loaded
    when the part is made."""

    says: str
    target: str
    traits: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Listed:
    """A name as it is listed. ``source``: the package that it comes from. ``trouble``: why it cannot be
    used."""

    name: str
    says: str
    source: str
    trouble: str | None = None


class Registry(Generic[Part]):
    """The names of one kind. ``kind``: in the plural, as it is listed and in the entry points' group;
    ``one``: what one of them is called."""

    def __init__(self, kind: str, one: str, own: Mapping[str, Entry]) -> None:
        self.kind, self.one, self.own = kind, one, dict(own)
        self._registered: dict[str, tuple[Part, str]] = {}

    @property
    def group(self) -> str:
        """The group of entry points that others register in."""
        return f"featureinterp.{self.kind}"

    def names(self) -> list[str]:
        """Every name, this project's own first. Loads no part."""
        return list(dict.fromkeys((*self.own, *self._registered, *(p.name for p in self._points()))))

    def register(self, name: str, part: Part, says: str = "") -> None:
        """Adds a part for this process: in a notebook, for example. Raises ``InputError`` for a name of this
        project's own."""
        if name in self.own:
            raise InputError(f"the {self.one} {name!r} is this project's own: choose another name")
        self._registered[name] = (part, says or first_line(part))

    def check(self, name: str) -> str:
        """The name itself. Raises ``UnknownNameError`` for one that stands for nothing."""
        if name not in self.own and name not in self._registered and not self._points(name):
            known = ", ".join(self.names()) or "none"
            raise UnknownNameError(f"there is no {self.one} {name!r}: choose from {known}")
        return name

    def load(self, name: str) -> Part:
        """The part of that name. Raises ``UnknownNameError`` for a name that stands for nothing and
        ``InputError`` for one whose package cannot be loaded, or that two packages claim."""
        if name in self.own:
            own: Part = _object(self.own[name].target)
            return own
        if name in self._registered:
            return self._registered[name][0]
        self.check(name)
        return self._loaded(self._points(name))

    def has(self, name: str, trait: str) -> bool:
        """Whether the part of that name has a trait. Loads no part of this project's own."""
        return trait in (self.own[name].traits if name in self.own else traits_of(self.load(name)))

    def listed(self) -> list[Listed]:
        """Every name with what it is. What cannot be loaded says why."""
        found = [Listed(name, entry.says, "featureinterp") for name, entry in self.own.items()]
        found += [Listed(name, says, "this process") for name, (_, says) in self._registered.items()]
        for name in dict.fromkeys(p.name for p in self._points()):
            points = self._points(name)
            source = ", ".join(sorted({_source(p) for p in points}))
            if name in self.own or name in self._registered:
                trouble = f"not used: another {self.one} has this name"
                found.append(Listed(name, "", source, trouble))
                continue
            try:
                found.append(Listed(name, first_line(self._loaded(points)), source))
            except InputError as error:
                found.append(Listed(name, "", source, str(error)))
        return found

    def _points(self, name: str | None = None) -> list[EntryPoint]:
        from importlib.metadata import entry_points

        return [p for p in entry_points(group=self.group) if name is None or p.name == name]

    def _loaded(self, points: list[EntryPoint]) -> Part:
        point, *others = sorted(points, key=_source)
        if any(other.value != point.value for other in others):
            both = ", ".join(dict.fromkeys(map(_source, (point, *others))))
            raise InputError(
                f"several packages have a {self.one} {point.name!r} ({both}): remove all but one of them"
            )
        try:
            part: Part = point.load()
            return part
        except Exception as error:  # whatever another's module raises when it is imported
            raise InputError(
                f"the {self.one} {point.name!r} of the package {_source(point)} cannot be loaded "
                f"({type(error).__name__}: {' '.join(str(error).split())}): mend or remove the package"
            ) from error


def traits_of(part: Any) -> frozenset[str]:
    """What a part says of itself in its attribute ``traits``; nothing where it has none."""
    return frozenset(getattr(part, "traits", ()))


def first_line(part: Any) -> str:
    """The first sentence of a part's own docstring."""
    text = " ".join((getattr(part, "__doc__", None) or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


def _object(target: str) -> Any:
    module, _, path = target.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _source(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed package"


def _own(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, Entry]:
    """Entries from rows of name, target, traits and what it is."""
    return {
        name: Entry(says, f"featureinterp.{target}", frozenset(traits.split()))
        for name, target, traits, says in rows
    }


EXPLAINERS: Registry[Callable[[Parts], Explainer]] = Registry(
    "explainers",
    "explainer",
    _own(
        (
            (
                "one-shot",
                "explainers.one_shot:OneShot.of_job",
                "asks causes",
                "one prompt with marked windows",
            ),
            (
                "tree",
                "explainers.tree:Tree.of_job",
                "asks causes searches",
                "a search: one-shot explanations, improved on the windows that they predict worst",
            ),
            (
                "top-tokens",
                "explainers.baselines:TopTokens.of_job",
                "",
                "no model: the tokens with the largest mean activation",
            ),
        )
    ),
)

SIMULATORS: Registry[Callable[[Parts], Simulator]] = Registry(
    "simulators",
    "simulator",
    _own(
        (
            (
                "token-wise",
                "local.token_wise:TokenWise.of_job",
                "local",
                "a model of this process, asked about one token at a time, calibrated",
            ),
            (
                "all-at-once",
                "local.all_at_once:AllAtOnce.of_job",
                "local chat",
                "a model of this process, one forward pass per window",
            ),
            (
                "prompt-logprobs",
                "simulators.prompt_logprobs:PromptLogprobs.of_job",
                "asks chat",
                "the all-at-once prompt on an endpoint that gives the probabilities of a prompt",
            ),
            (
                "rated",
                "simulators.rated:Rated.of_job",
                "asks",
                "a chat endpoint, which writes a level for every token",
            ),
            (
                "lexical",
                "simulators.lexical:Lexical.of_job",
                "",
                "no model: tokens that a rule quotes, and words that it holds",
            ),
        )
    ),
)

STAGES: Registry[Callable[[Parts], Stage[Any]]] = Registry(
    "stages",
    "stage",
    _own(
        (
            ("explain", "jobs.stages.explain:Explain.of_job", "", "says what each feature means"),
            (
                "simulate",
                "jobs.stages.simulate:Simulate.of_job",
                "null",
                "predicts activations by the explanation, and correlates them with the true ones",
            ),
            (
                "score",
                "jobs.stages.score:Scoring.of_job",
                "asks null",
                "puts the job's scorers' questions to the judge",
            ),
            (
                "falsify",
                "jobs.stages.falsify:Falsify.of_job",
                "asks live searches",
                "writes texts that test the explanation, and revises what they contradict",
            ),
            (
                "steer",
                "jobs.stages.steer:Steer.of_job",
                "asks live",
                "has the subject write while the feature is pushed",
            ),
        )
    ),
)

SCORERS: Registry[Callable[[Parts], Stage[Any]]] = Registry(
    "scorers",
    "scorer",
    _own(
        (
            (
                "detection",
                "jobs.stages.detection:Detect.of_job",
                "asks null",
                "in which windows is what the explanation describes?",
            ),
            (
                "fuzzing",
                "jobs.stages.fuzzing:Fuzz.of_job",
                "asks null",
                "are the marked tokens those that the explanation describes?",
            ),
            (
                "complexity",
                "jobs.stages.complexity:Rate.of_job",
                "asks",
                "how abstract is each rule, from 0 (a fixed token) to 5 (an idea)?",
            ),
        )
    ),
)

WINDOWS: Registry[Callable[[Any], Iterable[int]]] = Registry(
    "windows",
    "kind of window",
    _own(
        (
            ("top", "sampling.kinds:top", "fires", "the strongest windows"),
            ("weighted", "sampling.kinds:weighted", "fires centred", "tokens drawn by their activation"),
            ("quantile", "sampling.kinds:quantile", "fires", "from every part of the range of activations"),
            ("random", "sampling.kinds:uniform", "", "at random, whether the feature fires or not"),
            ("random_negative", "sampling.kinds:uniform", "", "at random, where the feature is silent"),
            ("similar", "sampling.kinds:similar", "embeds", "sentence embeddings near those of top windows"),
            ("similar_negative", "sampling.kinds:similar", "embeds", "the same, where the feature is silent"),
            (
                "projected_similar",
                "sampling.kinds:projected_similar",
                "embeds",
                "the same after a projection that pulls the top windows together",
            ),
            (
                "projected_similar_negative",
                "sampling.kinds:projected_similar",
                "embeds",
                "the same, where the feature is silent",
            ),
            (
                "coactive_negative",
                "sampling.kinds:coactive",
                "",
                "where a feature of nearly the same decoder direction fires, and this one is silent",
            ),
        )
    ),
)

EMBEDDERS: Registry[Callable[[], Embedder]] = Registry(
    "embedders",
    "embedder",
    _own(
        (
            (
                "all-minilm-l6-v2",
                "sampling.similar:SentenceEmbedder",
                "",
                "the embedded sentence-transformers model; every other one by its hub name or folder",
            ),
        )
    ),
)

FORMATS: Registry[WriteTable] = Registry(
    "formats",
    "format",
    _own(
        (
            ("parquet", "reports.export:write_parquet", "", "Apache Parquet, with typed columns"),
            ("csv", "reports.export:write_csv", "", "comma-separated text for spreadsheets"),
            ("jsonl", "reports.export:write_jsonl", "", "one JSON object per line"),
        )
    ),
)

LAYOUTS: Registry[Layout] = Registry(
    "layouts",
    "layout",
    _own(
        (
            ("saelens", "sae.layouts.saelens:LAYOUT", "", "SAELens: cfg.json and sae_weights.safetensors"),
            (
                "dictionary-learning",
                "sae.layouts.dictionary_learning:LAYOUT",
                "",
                "dictionary_learning: ae.pt and config.json",
            ),
            ("gemma-scope", "sae.layouts.gemma_scope:LAYOUT", "", "Gemma Scope: params.npz"),
            ("own", "sae.layouts.own:LAYOUT", "", "this project's: config.json and weights.safetensors"),
        )
    ),
)

REGISTRIES: dict[str, Registry[Any]] = {
    r.kind: r for r in (EXPLAINERS, SIMULATORS, SCORERS, STAGES, WINDOWS, EMBEDDERS, FORMATS, LAYOUTS)
}


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind. Raises ``UnknownNameError`` for a kind that does not exist."""
    if kind not in REGISTRIES:
        raise UnknownNameError(f"there is no kind of part {kind!r}: choose from {', '.join(REGISTRIES)}")
    return REGISTRIES[kind]
