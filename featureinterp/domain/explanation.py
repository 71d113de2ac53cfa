"""What a feature is said to mean, and where that came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from featureinterp.domain.plain import Plain
from featureinterp.domain.usage import Usage

MAX_RULES = 10
MAX_TEXT = 512


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition under which the feature fires. ``strength``: integer 0–5, the level it then reaches."""

    activates_on: str
    strength: int

    def __post_init__(self) -> None:
        if not self.activates_on.strip():
            raise ValueError("a rule needs a text that says what activates the feature")
        if not 0 <= self.strength <= 5:
            raise ValueError(f"a rule's strength is an integer from 0 to 5, not {self.strength}")


@dataclass(frozen=True, slots=True)
class SearchNode(Plain):
    """One explanation that a tree search tried.

    ``number``: its place in the order of making; ``parent``: the number of the one that it improves, None for
    a root; ``depth``: 0 for a root. ``improvement``: what the model said was wrong with the parent.
    ``train``, ``valid``, ``test``: correlations of its simulation with the true activations on each split,
    None where undefined or not computed; the search looks at the first two alone. ``kept``: whether the
    search went on from it. ``chosen``: whether it is the answer. ``failure``: why there is no explanation
    (``rules`` is empty) or no score.
    """

    number: int
    parent: int | None
    depth: int
    rules: tuple[Rule, ...]
    improvement: str | None = None
    train: float | None = None
    valid: float | None = None
    test: float | None = None
    kept: bool = False
    chosen: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an explanation came from. ``method``: explainer's name; ``prompt``: name/version;
    ``prompt_hash``: of its files. ``left_out``: rules of the reply that are not in it (without a text, of
    strength 0, said twice, or beyond the cap)."""

    method: str
    model: str | None = None
    prompt: str | None = None
    prompt_hash: str | None = None
    temperature: float | None = None
    seed: int | None = None
    examples: tuple[int, ...] = ()
    usage: Usage = field(default_factory=Usage)
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Explanation(Plain):
    """Structured rules, or one sentence (``rules`` is then a single rule of strength 5 and ``structured`` is
    False).

    ``search``: everything that was tried, where the explanation was searched for.
    """

    rules: tuple[Rule, ...]
    provenance: Provenance
    structured: bool = True
    search: tuple[SearchNode, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.rules) <= MAX_RULES:
            raise ValueError(f"an explanation has from 1 to {MAX_RULES} rules, not {len(self.rules)}")
        if not self.structured and len(self.rules) != 1:
            raise ValueError("an explanation of one sentence has one rule")

    @classmethod
    def sentence(cls, text: str, provenance: Provenance) -> Explanation:
        """An explanation of one sentence."""
        return cls((Rule(text, 5),), provenance, structured=False)

    @property
    def text(self) -> str:
        """It in one line: the sentence, or the rules joined by semicolons, strongest first."""
        return "; ".join(rule.activates_on for rule in sorted(self.rules, key=lambda r: -r.strength))
