"""How much of a token's probability do the answers hold that a judge is asked for?

    python scripts/experiments/answer_share.py JOB [JOB ...]

``JOB``: a job's folder, with the ``replies.sqlite`` in which the questions of detection, fuzzing and
complexity keep their answers. Asks nobody anything. Prints the distribution, over all kept answers of a
model, of the share that "yes" and "no" (or the levels 0 to 5, where they hold more) have of the first token's
probability, and how many answers lie below the share that is asked for
(:data:`featureinterp.scorers.answers.MIN_SHARE`).
"""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featureinterp.scorers.answers import LEVELS, MIN_SHARE, expected_masses

KINDS = {"yes or no": ("yes", "no"), "level": LEVELS}
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 1.0)


def shares(job: Path) -> Iterator[tuple[str, str, float]]:
    """The model, the kind of answer and the share of each kept answer that came with probabilities."""
    store = sqlite3.connect(f"{(job / 'replies.sqlite').resolve().as_uri()}?mode=ro", uri=True)
    for model, text in store.execute("SELECT model, reply FROM replies"):
        for first in json.loads(text)["first_token"]:
            if first:
                held = {kind: sum(expected_masses(first, a).values()) for kind, a in KINDS.items()}
                kind = max(held, key=held.__getitem__)
                yield model, kind, min(1.0, held[kind])
    store.close()


def table(jobs: list[Path]) -> list[str]:
    """The distribution as lines of Markdown."""
    found: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for job in jobs:
        for model, kind, share in shares(job):
            found[str(job), model, kind].append(share)
    names = ["least", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "most"]
    head = ["job", "model", "answer", "questions", *names, f"below {MIN_SHARE:.0%}"]
    rows = [
        [*key, f"{len(held):,}", *(f"{q:.2%}" for q in np.quantile(held, QUANTILES)), f"{below(held):,}"]
        for key, held in sorted(found.items())
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def below(held: list[float]) -> int:
    """How many shares do not count."""
    return sum(share < MIN_SHARE for share in held)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="+", type=Path, metavar="JOB", help="a job's folder")
    print("\n".join(table(parser.parse_args().jobs)))


if __name__ == "__main__":
    main()
