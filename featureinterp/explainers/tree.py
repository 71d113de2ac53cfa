"""Tree: explanations that are simulated, shown their worst errors, and improved, level by level."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pydantic

from featureinterp.domain.chat import Message, Request
from featureinterp.domain.explanation import Explanation, Provenance, Rule, SearchNode
from featureinterp.domain.record import FeatureRecord, Source, Window
from featureinterp.domain.score import Agreement, Simulation
from featureinterp.domain.usage import Usage
from featureinterp.errors import EndpointRefusedError, InputError, LanguageModelError
from featureinterp.explainers.asking import ask
from featureinterp.explainers.one_shot import OneShot
from featureinterp.explainers.styles import Style
from featureinterp.explainers.windows import training_windows
from featureinterp.interfaces import Agree, LanguageModel, Parts, Simulator, settings_of
from featureinterp.prompts import escape, load_prompt
from featureinterp.registry import WINDOWS
from featureinterp.replies import object_schema, parse_reply
from featureinterp.tasks import each

MAX_IMPROVEMENT = 500
SHOWN_FROM = 0.5
"""Tokens that are shown with their errors: those of at least this level, predicted or true."""


class _Improvement(pydantic.BaseModel):
    improvement: str = ""


@dataclass(frozen=True)
class TreeSettings:
    """How far a search goes. ``roots``: one-shot explanations at the start. At each of ``depth`` levels the
    best ``width`` explanations on the training split, of those that were not yet, are improved ``branching``
    times each. ``stop_at``: the search ends when a training correlation reaches it.
    ``feedback``: how many of the worst windows are shown. ``negatives``: the kinds of windows that stand
    beside the top ones, as far as a record has them; ``n_windows`` of each kind."""

    roots: int = 3
    depth: int = 3
    width: int = 3
    branching: int = 2
    stop_at: float = 0.9
    feedback: int = 3
    negatives: tuple[Source, ...] = ("similar_negative", "random_negative")
    n_windows: int = 10

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name in ("roots", "width", "branching", "feedback", "n_windows"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"a tree search with {name} = {getattr(self, name)} is not possible: give at least 1"
                )
        for source in self.negatives:
            WINDOWS.check(source)
        if self.depth < 0:
            raise InputError(f"a tree search of depth {self.depth} is not possible: give 0 or more")


@dataclass
class _Node:
    """A node while the search runs."""

    kept: SearchNode
    explanation: Explanation | None = None
    train: Agreement | None = None
    simulations: Sequence[Simulation] = ()

    @property
    def rank(self) -> float:
        """What the search sorts by: the training correlation, undefined ones last."""
        return -np.inf if self.kept.train is None else self.kept.train


class Tree:
    """Searches for an explanation: one-shot roots, then levels of improvements on the windows whose
    predictions are most wrong.

    Simulations of the training split steer the search, those of the validation split choose the answer among
    all nodes, and the test split is never looked at. ``agree`` compares simulations with the truth. The
    answer's ``search`` holds every node, its provenance the cost of the whole search.
    """

    def __init__(
        self,
        model: LanguageModel,
        style: Style,
        simulator: Simulator,
        agree: Agree,
        *,
        tree: TreeSettings | None = None,
        temperature: float = 1.0,
        improve_temperature: float = 1.2,
        seed: int = 0,
        max_tokens: int = 400,
        version: str = "v2",
    ) -> None:
        self.model, self.style, self.simulator, self.agree = model, style, simulator, agree
        self.tree = tree or TreeSettings()
        self.improve_temperature, self.max_tokens = improve_temperature, max_tokens
        self.prompt = load_prompt("improve", version)
        self.root = OneShot(
            model,
            style,
            n_windows=self.tree.n_windows,
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
        )

    @classmethod
    def of_job(cls, parts: Parts) -> Tree:
        """The explainer of a job."""
        return cls.shaped(parts, parts.job.tree)

    @classmethod
    def shaped(cls, parts: Parts, tree: TreeSettings) -> Tree:
        """A search of another shape with a job's model, style and simulator."""
        simulator, seed = parts.kept_simulator, parts.job.plan.seed
        return cls(parts.model, parts.job.form(), simulator, parts.agree, tree=tree, seed=seed)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an explanation depends on, besides the record."""
        return {
            **self.root.settings,
            "explainer": "tree",
            "improve": [self.prompt.name, self.prompt.hash, self.improve_temperature],
            "tree": asdict(self.tree),
            "simulator": settings_of(self.simulator),
        }

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Raises what :class:`OneShot` raises when there is not one root, and ``InputError`` without windows
        to score on.
        """
        return await _Search(self, record).run()

    async def revise(self, record: FeatureRecord, explanation: Explanation) -> Explanation:
        """One level of improvements of a given explanation, on the record's training windows, counterexamples
        among them; the best on validation windows, which may be the given one."""
        return await _Search(self, record).revise(explanation)


class _Search:
    """One feature's search."""

    def __init__(self, tree: Tree, record: FeatureRecord) -> None:
        self.tree, self.shape, self.record = tree, tree.tree, record
        self.shown = training_windows(record, self.shape.n_windows)
        self.train = self._windows("train")
        self.valid = self._windows("valid")
        if not any(w.fires for w in self.valid):
            raise InputError(
                f"feature {record.feature.index} fires in no validation window: a tree search has nothing "
                "to choose by"
            )
        self.nodes: list[_Node] = []
        self.usage = Usage()
        self._known: dict[tuple[tuple[str, int], ...], _Node] = {}

    def _windows(self, split: Any) -> list[Window]:
        sources: tuple[Source, ...] = ("top", *self.shape.negatives, "counterexample")
        return [w for source in sources for w in self.record.get(split, source)[: self.shape.n_windows]]

    async def run(self) -> Explanation:
        shape = self.shape
        answers = await self.tree.root.samples(self.record, shape.roots)
        self.usage += answers.usage
        if not answers.found:
            assert answers.error is not None
            raise answers.error
        roots = [self._add(None, explanation) for explanation, _ in answers.found]
        missing = (
            [self._add(None, failure=str(answers.error)) for _ in range(shape.roots - len(roots))]
            if answers.error
            else []
        )
        await self._score([*roots, *missing])
        for _ in range(shape.depth):
            chosen = self._best()
            if not chosen or max(n.rank for n in self.nodes) >= shape.stop_at:
                break
            for node in chosen:
                node.kept = replace(node.kept, kept=True)
            made = await each(self._improve, chosen)
            await self._score(
                [
                    self._add(parent, *child)
                    for parent, found in zip(chosen, made, strict=True)
                    for child in found
                ]
            )
        return self._answer()

    async def revise(self, explanation: Explanation) -> Explanation:
        root = self._add(None, explanation)
        await self._score([root])
        root.kept = replace(root.kept, kept=True)
        await self._score([self._add(root, *child) for child in await self._improve(root)])
        return self._answer()

    def _add(
        self,
        parent: _Node | None,
        explanation: Explanation | None = None,
        improvement: str | None = None,
        failure: str | None = None,
    ) -> _Node:
        depth = 0 if parent is None else parent.kept.depth + 1
        rules = explanation.rules if explanation else ()
        kept = SearchNode(
            len(self.nodes),
            None if parent is None else parent.kept.number,
            depth,
            rules,
            improvement,
            failure=failure,
        )
        self.nodes.append(_Node(kept, explanation))
        return self.nodes[-1]

    def _best(self) -> list[_Node]:
        """The best nodes that were not improved yet, each explanation once; of equals those that are
        improvements themselves.
        """
        fresh = [n for n in self._known.values() if not n.kept.kept]
        return sorted(fresh, key=lambda n: (-n.rank, -n.kept.depth, n.kept.number))[: self.shape.width]

    async def _score(self, nodes: Sequence[_Node]) -> None:
        """Simulates what has not been simulated yet, all at once."""
        fresh = []
        for node in nodes:
            if node.explanation is not None and self._known.setdefault(_key(node.explanation), node) is node:
                fresh.append(node)
        await each(self._simulate, fresh)
        for node in nodes:
            if node.explanation is not None:
                same = self._known[_key(node.explanation)]
                node.train, node.simulations = same.train, same.simulations
                node.kept = replace(
                    node.kept, train=same.kept.train, valid=same.kept.valid, failure=same.kept.failure
                )

    async def _simulate(self, node: _Node) -> None:
        assert node.explanation is not None
        simulations = await self.tree.simulator.simulate(node.explanation, [*self.train, *self.valid])
        node.simulations = simulations[: len(self.train)]
        node.train = self.tree.agree(self.train, node.simulations)
        valid = self.tree.agree(self.valid, simulations[len(self.train) :])
        failed = [s.failure for s in simulations if s.failure]
        cause = (
            f"{len(failed)} of {len(simulations)} windows could not be simulated: {failed[0]}"
            if failed
            else None
        )
        node.kept = replace(node.kept, train=node.train.value, valid=valid.value, failure=cause)

    async def _improve(self, node: _Node) -> list[tuple[Explanation | None, str | None, str | None]]:
        """Explanations with the improvement in words, and a failure for each that is missing."""
        tree, shape = self.tree, self.shape
        assert node.explanation is not None
        explanation = node.explanation
        answer = Message("assistant", json.dumps(tree.style.write(explanation), ensure_ascii=False))
        schema = object_schema({"improvement": {"type": "string"}, **tree.style.fields})
        messages = (
            *tree.style.messages(self.record, self.shown),
            answer,
            Message("user", self._feedback(node)),
        )
        request = Request(
            messages,
            tree.max_tokens,
            tree.improve_temperature,
            tree.root.seed + node.kept.number + 1,
            shape.branching,
            schema,
        )

        def read(text: str) -> tuple[Explanation, str]:
            words = " ".join(parse_reply(text, _Improvement).improvement.split())
            return tree.style.read(text, explanation.provenance), words[:MAX_IMPROVEMENT]

        try:
            answers = await ask(tree.model, request, read)
        except EndpointRefusedError:
            raise
        except LanguageModelError as error:
            return [(None, None, f"{type(error).__name__}: {error}")] * shape.branching
        self.usage += answers.usage
        found: list[tuple[Explanation | None, str | None, str | None]] = [
            (e, words, None) for (e, words), _ in answers.found
        ]
        return found + [(None, None, str(answers.error))] * (shape.branching - len(found))

    def _feedback(self, node: _Node) -> str:
        """The worst windows with their texts, and of their tokens those that are predicted or fire, or of a
        window without any those that are most wrong.
        """
        scale, rescaled = self.record.scale, _rescaling(self.train, node.simulations, self.record.scale)
        windows = []
        for i in worst(node.train, self.train, node.simulations, scale, self.shape.feedback):
            window, expected = self.train[i], node.simulations[i].expected
            assert expected is not None
            true, predicted = 5 * window.activations / scale, rescaled(expected)
            lines = [
                {"token": escape(p), "predicted": x, "true": y, "error": x - y}
                for p, x, y in zip(window.pieces, predicted.tolist(), true.tolist(), strict=True)
            ]
            shown = [line for line in lines if max(line["predicted"], line["true"]) >= SHOWN_FROM] or sorted(
                lines, key=lambda line: -abs(line["error"])
            )[:3]
            windows.append({"text": escape(window.text.strip()), "lines": shown})
        cap = getattr(self.tree.style, "rule_cap", None)
        missed, wrong = _mistaken(windows, -1), _mistaken(windows, 1)
        values = {
            "score": node.kept.train,
            "windows": windows,
            "missed": missed,
            "wrong": wrong,
            "rule_cap": cap,
            "example": self._example(),
        }
        return self.tree.prompt.render("user.j2", **values)

    def _example(self) -> str:
        """A reply in the style's form."""
        shown = self.tree.prompt.json("example.json")
        rules = tuple(Rule(text, strength) for text, strength in shown["rules"])
        return json.dumps(
            {
                "improvement": shown["improvement"],
                **self.tree.style.write(Explanation(rules, Provenance("example"))),
            },
            ensure_ascii=False,
        )

    def _answer(self) -> Explanation:
        whole = [n for n in self.nodes if n.explanation is not None]
        best = max(whole, key=lambda n: (-np.inf if n.kept.valid is None else n.kept.valid, -n.kept.number))
        best.kept = replace(best.kept, chosen=True)
        assert best.explanation is not None
        tree, old = self.tree, best.explanation.provenance
        provenance = Provenance(
            "tree",
            tree.model.name,
            f"{old.prompt} + {tree.prompt.name}",
            f"{old.prompt_hash} + {tree.prompt.hash}",
            tree.improve_temperature,
            tree.root.seed,
            old.examples,
            self.usage,
            old.left_out,
        )
        return replace(best.explanation, provenance=provenance, search=tuple(n.kept for n in self.nodes))


def worst(
    train: Agreement | None,
    windows: Sequence[Window],
    simulations: Sequence[Simulation],
    scale: float,
    n: int,
) -> list[int]:
    """The ``n`` windows whose removal raises the correlation most, the worst first; where it is undefined,
    those with the largest error.
    """
    usable = [i for i, s in enumerate(simulations) if s.expected is not None]
    if train is not None and train.value is not None:
        gain = np.nan_to_num(train.without, nan=-np.inf)
    else:
        gain = np.array(
            [
                0.0 if s.expected is None else np.abs(s.expected - 5 * w.activations / scale).sum()
                for w, s in zip(windows, simulations, strict=True)
            ]
        )
    return sorted(usable, key=lambda i: (-gain[i], i))[:n]


def _mistaken(windows: Sequence[Mapping[str, Any]], sign: int) -> list[str]:
    """Tokens whose error has this sign and is at least 1, the largest first; at most eight."""
    found = sorted(
        (
            (sign * line["error"], line["token"])
            for w in windows
            for line in w["lines"]
            if sign * line["error"] >= 1
        ),
        key=lambda pair: -pair[0],
    )
    return [token.replace("|", "\\|") for token in dict.fromkeys(token for _, token in found)][
        :8
    ]  # they are escaped already


def _rescaling(
    windows: Sequence[Window], simulations: Sequence[Simulation], scale: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Predictions on the scale of true levels, by least squares over the windows: a simulator may use a part
    of 0 … 5 only, and all its errors would look alike. As they are where the two do not rise together."""
    known = [
        (5 * w.activations / scale, s.expected)
        for w, s in zip(windows, simulations, strict=True)
        if s.expected is not None
    ]
    y, x = (
        (np.concatenate(column) if known else np.zeros(0) for column in zip(*known, strict=True))
        if known
        else (np.zeros(0), np.zeros(0))
    )
    slope = float(np.cov(x, y, bias=True)[0, 1] / x.var()) if len(x) and x.var() > 0 else 0.0
    if slope <= 0:
        return lambda expected: expected
    return lambda expected: np.clip(slope * (expected - x.mean()) + y.mean(), 0, 5)


def _key(explanation: Explanation) -> tuple[tuple[str, int], ...]:
    return tuple((r.activates_on, r.strength) for r in explanation.rules)
