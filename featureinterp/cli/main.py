"""The program ``featureinterp``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from featureinterp import __version__
from featureinterp.cli import (
    collect,
    demo,
    explain,
    falsify,
    jobs,
    listing,
    llm,
    models,
    probe,
    records,
    report,
    saes,
    sensitivity,
    serve,
    steer,
    training,
    verify,
)
from featureinterp.visible import visible

INTERRUPTED = 130
"""Exit code after Ctrl-C or a request to end."""

app = typer.Typer(
    name="featureinterp",
    help="Explains features of sparse autoencoders with language models, and tests the explanations.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("demo")(demo.demo)
app.add_typer(models.app, name="models")
app.add_typer(saes.app, name="saes")
app.command("collect")(collect.collect)
app.command("records")(records.records)
app.command("explain")(explain.explain)
app.command("falsify")(falsify.falsify)
app.command("steer")(steer.steer)
app.command("probe")(probe.probe)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("extract")(training.extract)
app.command("train")(training.train)
app.command("evaluate")(training.evaluate)
app.command("doctor")(training.doctor)
app.command("layers")(training.layers)
app.command("list")(listing.list_parts)
app.command("run")(jobs.run)
app.command("status")(jobs.status)
app.command("export")(jobs.export)
app.command("serve")(serve.serve)
app.command("report")(report.report)
app.command("verify")(verify.verify)
app.add_typer(llm.app, name="llm")


def _version(value: bool) -> None:
    if value:
        print(f"featureinterp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    pass


def _terminated(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does."""
    interrupt = signal.getsignal(signal.SIGINT)
    assert callable(interrupt)
    interrupt(number, frame)


def _stop() -> NoReturn:
    print(
        "featureinterp: stopped; what is finished is kept, and the same command goes on from there",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)  # a model that computes in a thread would hold up an orderly exit


def main() -> None:
    """Runs the program: exit code 0 done, 1 finished with failures, 2 could not start or go on; errors are
    one sentence.
    """
    debug = "--debug" in sys.argv[1:]
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    from featureinterp.errors import FeatureInterpError

    if not callable(
        signal.getsignal(signal.SIGINT)
    ):  # ignored, in the background of a script: it still is, but there is a way to end in order
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(args=argv)
    except FeatureInterpError as error:
        if debug:
            raise
        print(f"featureinterp: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        _stop()


if __name__ == "__main__":
    main()
