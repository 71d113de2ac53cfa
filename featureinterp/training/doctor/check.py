"""A check and what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featureinterp.errors import FeatureInterpError

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found. ``subject``: what was looked at (model, corpus, activations, training, result);
    ``figure``: what was measured; ``advice``: what to do, empty when all is well."""

    subject: str
    name: str
    status: Status
    figure: str = ""
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


class Sheet:
    """Collects the checks of one subject. An error of the project inside a check is a finding, not the
    end.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[Check] = []

    def passed(self, name: str, figure: str = "") -> None:
        self.found.append(Check(self.subject, name, "pass", figure))

    def skipped(self, name: str, why: str) -> None:
        self.found.append(Check(self.subject, name, "skip", why))

    def warn(self, name: str, figure: str, advice: str) -> None:
        self.found.append(Check(self.subject, name, "warn", figure, advice))

    def fail(self, name: str, figure: str, advice: str) -> None:
        self.found.append(Check(self.subject, name, "fail", figure, advice))

    def judge(self, name: str, good: bool, figure: str, advice: str, *, otherwise: Status = "fail") -> None:
        """Passed when ``good``."""
        self.found.append(
            Check(self.subject, name, "pass" if good else otherwise, figure, "" if good else advice)
        )

    def attempt(self, name: str, look: Callable[[], None]) -> bool:
        """Runs a check; what it raises is its finding. Whether it went through."""
        try:
            look()
        except FeatureInterpError as error:
            self.found.append(Check(self.subject, name, "fail", "", str(error)))
            return False
        return True

    def __iter__(self) -> Iterator[Check]:
        return iter(self.found)
