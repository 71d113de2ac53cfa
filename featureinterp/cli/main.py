"""The program ``featureinterp``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from featureinterp import __version__
from featureinterp.cli import (
    collect,
    demo,
    doctor,
    evaluate,
    explain,
    extract,
    falsify,
    jobs,
    layers,
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
    train,
    verify,
)
from featureinterp.cli.verb import add
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
add(app, "demo", demo.demo)
app.add_typer(models.app, name="models")
app.add_typer(saes.app, name="saes")
add(app, "collect", collect.collect)
add(app, "records", records.records)
add(app, "explain", explain.explain)
add(app, "falsify", falsify.falsify)
add(app, "steer", steer.steer)
add(app, "probe", probe.probe)
add(app, "sensitivity", sensitivity.sensitivity)
add(app, "extract", extract.extract)
add(app, "train", train.train)
add(app, "evaluate", evaluate.evaluate)
add(app, "doctor", doctor.doctor)
add(app, "layers", layers.layers)
add(app, "list", listing.list_parts)
add(app, "run", jobs.run)
add(app, "status", jobs.status)
add(app, "export", jobs.export)
add(app, "serve", serve.serve)
add(app, "report", report.report)
add(app, "verify", verify.verify)
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


def _misused(error: TyperException) -> NoReturn:
    """Says in one sentence what is wrong with the command; the bare name of a group asks for its help."""
    says = error.format_message()
    if says.startswith("Usage: "):
        print(says)
    else:
        line = " ".join(visible(says).split()).replace("Value error, ", "").removesuffix(".")
        print(f"featureinterp: {line[:1].lower()}{line[1:]}: see {_help_of(error)}", file=sys.stderr)
    sys.exit(2)


def _help_of(error: TyperException) -> str:
    """The command that shows the help of the verb that was misused."""
    context = getattr(error, "ctx", None)
    return f"'{context.command_path if context else 'featureinterp'} --help'"


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
        code = app(args=argv, standalone_mode=False, prog_name="featureinterp")
    except FeatureInterpError as error:
        if debug:
            raise
        print(f"featureinterp: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except TyperException as error:
        _misused(error)
    if code == INTERRUPTED:
        _stop()
    sys.exit(code)


if __name__ == "__main__":
    main()
