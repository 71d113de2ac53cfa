"""What the verbs put on a terminal: progress with the remaining time, and lines as results come in."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featureinterp.visible import visible, visible_json

if TYPE_CHECKING:
    from pathlib import Path

    from featureinterp.api import Results
    from featureinterp.domain.score import Score
    from featureinterp.jobs.plan import Event, Progress

_LOG_EVERY_S = 10.0
_SHORT_CELL = 32
_EACH_UP_TO = 50
"""Jobs of more features are shown as a whole, not feature by feature; what fails always is."""


class Screen:
    """Progress bars on a terminal, one line now and then in a log, nothing but JSON on standard output when
    ``json`` is on.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        elapsed = TimeElapsedColumn()

        class Count(MofNCompleteColumn):
            def render(self, task: Task) -> Text:
                return Text() if task.total is None else super().render(task)

        class Time(TimeRemainingColumn):
            def render(self, task: Task) -> Text:
                return elapsed.render(task) if task.total is None else super().render(task)

        self.as_json = as_json
        self.console = Console(
            file=sys.stderr, highlight=False
        )  # this very stream: libraries are silenced by putting another in its place
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            Count(),
            Time(),
            console=self.console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._logged: dict[str, float] = {}
        self._job: Any = None

    @contextmanager
    def live(self) -> Iterator[Screen]:
        """Bars are drawn within the block; one that says how long it has been at work is there from the
        start.
        """
        if not self.console.is_terminal:
            yield self
            return
        self._job = self._progress.add_task("working", total=None)
        with self._progress:
            yield self

    def step(self, what: str, done: int, total: int) -> None:
        """Progress of one kind of work."""
        if self.console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.update(self._tasks[what], completed=done, total=total)
            if done >= total:
                self._progress.update(self._tasks[what], visible=False)
            return
        now = time.monotonic()
        if done >= total or now - self._logged.get(what, 0.0) >= _LOG_EVERY_S:
            self._logged[what] = now
            self.say(f"{what}: {done:,} of {total:,}")

    def say(self, line: str) -> None:
        """One line for a person."""
        from rich.markup import escape

        if not self.as_json or not self.console.is_terminal:
            self.console.print(escape(visible(line)), soft_wrap=True)

    def machine(
        self, dtype: str | None = None, device: str | None = None, *, what: str = "models run"
    ) -> None:
        """The first line of a verb that computes: the machine, and what ``auto`` comes to on it."""
        from featureinterp.machine import choice

        found = choice(dtype, device)
        self.say(
            f"machine: {found['machine']}; {what} on {found['device']} in {found['dtype']} ({found['why']})"
        )

    def event(self, event: Event) -> None:
        """A feature that got through a stage."""
        result = event.result
        self.step(event.stage, event.done, event.total)
        self._note(event.progress)
        for failure in result.failures:
            if (failure.stage == "explain") != (event.stage == "explained"):
                continue  # it is told with the stage that it belongs to
            self.say(f"feature {result.feature}: {failure.stage} failed: {failure.message}")
        if event.total > _EACH_UP_TO:
            return
        if event.stage == "explained" and result.explanation is not None:
            floor = result.baseline_score("correlation")
            known = f"  [top-token list r = {figure(floor)}]" if floor else ""
            self.say(f"feature {result.feature}: {one_line(result.explanation.text)}{known}")
        if event.stage == "scored" and (score := result.score("correlation")):
            self.say(
                f"feature {result.feature}: r = {figure(score)}, null {plain(score.null)}, "
                f"{'as before' if event.reused else 'new'}"
            )

    def _note(self, progress: Progress) -> None:
        """How the job as a whole is going: beside the bars, or in a log now and then."""
        line = progress_line(progress)
        if self.console.is_terminal:
            if self._job is None:
                return
            self._progress.update(self._job, description=line)
            return
        now = time.monotonic()
        if now - self._logged.get("job", 0.0) >= _LOG_EVERY_S:
            self._logged["job"] = now
            self.say(line)

    def table(self, rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
        """A table on standard output. Short cells stay in one line, so that a name can be copied; long ones
        wrap.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        header, *rows = (tuple(map(visible, row)) for row in (header, *rows))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, *cells in zip(header, *rows, strict=True):
            longest = max(map(len, [title, *cells]))
            short = longest <= _SHORT_CELL
            table.add_column(title, no_wrap=short, min_width=longest if short else None)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)

    def result(self, value: Any) -> None:
        """The verb's result for a program: one JSON document on standard output."""
        sys.stdout.write(visible_json(json.dumps(value, ensure_ascii=False)) + "\n")


def put(line: str) -> None:
    """One line on standard output, for a person."""
    print(visible(line))


def end(screen: Screen, results: Results) -> None:
    """The end of a job's verb: its last lines say what is missing and why, and the exit code is 1 when
    something is.
    """
    if results.n_failed or results.n_partial:
        say_causes(screen, results.folder)
    stopped: str | None = None
    if results.stopped is not None:
        rest = results.outcome.price_of_the_rest if results.outcome is not None else None
        left = f"; {len(results.outcome.left)} features are left" if results.outcome is not None else ""
        stopped = f"{results.stopped}{left}" + ("" if rest is None else f", about ${rest:.2f} more")
    end_with(screen, stopped, results.n_failed, results.n_partial, results.n_features)


def say_causes(screen: Screen, folder: Path) -> None:
    """The commonest causes of what failed in a job."""
    from featureinterp.jobs.journal import Journal

    if not (folder / "journal.sqlite").exists():
        return
    with Journal(folder / "journal.sqlite") as journal:
        causes = journal.causes(3)
    for cause in causes:
        screen.say(
            f"{cause['n']:,} × {cause['stage']}: {cause['error']}: {one_line(str(cause['message']), 200)}"
        )


def end_with(screen: Screen, stopped: object, failed: int, partial: int, total: int) -> None:
    """The same from counts of features."""
    if failed or partial:
        screen.say(
            f"{failed:,} of {total:,} features failed and {partial:,} have gaps: the same command asks "
            "again for what got no answer, and with "
            "--retry-failed also for what got one that could not be used"
        )
    if stopped is not None:
        screen.say(f"stopped: {stopped}: the same command goes on")
    if stopped is not None or failed or partial:
        import typer

        raise typer.Exit(1)


def progress_line(p: Progress) -> str:
    """A job's progress in one line."""
    parts = [f"{p.done:,} done", f"{p.failed:,} failed", f"{p.in_flight} in flight"]
    if p.tokens and p.seconds > 0:
        parts.append(f"{p.tokens / p.seconds:,.0f} tokens/s")
    if p.cost_usd:
        parts.append(f"${p.cost_usd:.4f}{' (estimated)' if p.estimated else ''}")
    if p.left_s is not None:
        minutes = p.left_s / 60
        parts.append(
            f"{minutes / 60:.1f} h left"
            if minutes >= 90
            else f"{minutes:.0f} min left"
            if minutes >= 1.5
            else f"{p.left_s:.0f} s left"
        )
    return ", ".join(parts)


def figure(score: Score | None) -> str:
    """A score with its interval, or why there is none."""
    if score is None:
        return "none"
    if score.value is None:
        return f"undefined ({score.undefined})"
    interval = f" ({score.interval.low:.2f} to {score.interval.high:.2f})" if score.interval else ""
    return f"{score.value:.2f}{interval}"


def plain(value: float | None) -> str:
    """A figure with two digits, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def one_line(text: str, most: int = 100) -> str:
    """A text from a model on one line, with what cannot be seen as escapes, cut to fit."""
    clean = visible(" ".join(text.split()))
    return clean if len(clean) <= most else clean[: most - 1] + "…"
