"""What a journal's key rests on says what it depends on, or is refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_jobs import PLAN, Levels, go, records  # noqa: F401 (a fixture)

from featureinterp.domain.explanation import Explanation, Provenance, Rule
from featureinterp.domain.record import FeatureRecord, Window
from featureinterp.domain.score import Simulation
from featureinterp.errors import InputError
from featureinterp.explainers.baselines import TopTokens
from featureinterp.explainers.styles import SentenceStyle
from featureinterp.explainers.tree import Tree
from featureinterp.falsification.counterexamples import Falsifier
from featureinterp.falsification.intervention import Interventions
from featureinterp.interfaces import settings_of
from featureinterp.jobs.explain import ExplainJob
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.kept import KeptSimulator
from featureinterp.llm.function import FunctionModel
from featureinterp.scorers.correlation import agreement
from featureinterp.simulators.lexical import Lexical


class Fixed:
    """A user's simulator: every token has one level."""

    def __init__(self, level: float, **settings: Any) -> None:
        self.level, self.calls = level, 0
        if settings:
            self.settings = settings

    async def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[Simulation]:
        self.calls += 1
        return [Simulation(np.full(len(w.pieces), self.level)) for w in windows]


class Says:
    settings = {"explainer": "says"}

    async def explain(self, record: FeatureRecord) -> Explanation:
        return Explanation((Rule(f"the sea {record.feature.index}", 5),), Provenance("says"))


class Bare:
    """An explainer, activator, steerer and judge that says nothing of itself."""


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Fixed(1.0), "Fixed has no settings"),
        (Fixed(1.0, made_of=object()), "settings of Fixed cannot be written as JSON"),
        (type("Empty", (), {"settings": {}})(), "Empty has settings that are no mapping with content"),
        (type("Text", (), {"settings": "v1"})(), r"\('v1'\)"),
    ],
)
def test_a_part_without_usable_settings_is_refused(part: Any, words: str):
    with pytest.raises(InputError, match=words):
        settings_of(part)


def test_every_part_of_a_job_is_asked_for_its_settings(tmp_path: Path):
    model, bare = FunctionModel(lambda _: "Yes"), Bare()
    tree = Tree(model, SentenceStyle(), bare, agreement)
    kinds = {
        "explainer": {"explainer": bare},
        "simulator": {"simulator": bare},
        "a search's simulator": {"explainer": tree},
        "activator": {"falsifier": Falsifier(model, bare, bare)},
        "reviser": {"falsifier": Falsifier(model, Says(), Says()), "reviser": bare},
        "steerer": {"interventions": Interventions(bare, bare, Says())},
        "judge": {"interventions": Interventions(Says(), bare, bare)},
        "a stage": {"stages": (bare,)},
    }
    bare.name = "bare"
    with Journal(tmp_path / "j.sqlite") as journal:
        for what, parts in kinds.items():
            with pytest.raises(InputError, match="Bare has no settings: give it an attribute 'settings'"):
                ExplainJob(journal, **({"explainer": Says(), "simulator": Lexical()} | parts))
                raise AssertionError(what)
        with pytest.raises(InputError, match="Bare has no settings"):
            KeptSimulator(bare, journal)


def test_other_settings_of_a_user_s_simulator_make_what_is_kept_unknown(
    tmp_path: Path,
    records: list[FeatureRecord],  # noqa: F811
):
    def levels(simulator: Fixed) -> set[float]:
        with Journal(tmp_path / "j.sqlite") as journal:
            found = go(ExplainJob(journal, Says(), simulator, plan=PLAN), records[:1])
        return {level for w in found[0].windows if w.predicted for level in w.predicted}

    first, same, other = Fixed(1, version=1), Fixed(2, version=1), Fixed(2, version=2)
    assert levels(first) == {1.0} and first.calls == 1
    assert levels(same) == {1.0} and same.calls == 0, "the same settings promise the same results"
    assert levels(other) == {2.0} and other.calls == 1


def test_parts_of_this_project_say_what_they_are():
    assert settings_of(Lexical()) == {"simulator": "lexical"}
    assert settings_of(TopTokens(3)) == {"explainer": "top-tokens", "n_tokens": 3, "n_windows": 15}
    assert settings_of(TopTokens(3)) != settings_of(TopTokens(4))
    assert settings_of(Levels()) == {"simulator": "levels"}
