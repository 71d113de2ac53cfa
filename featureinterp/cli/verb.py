"""A verb of the program: options that are declared once, the other names they answer to, and its help."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException
from typer.models import OptionInfo

HEADINGS = ("Arguments", "Options", "Corpus", "Language model", "Limits", "Devices")
"""Of the help, in this order."""

_FIRST_COLUMN = 28
_GAP = 2


@dataclass(frozen=True)
class Also:
    """Another name that an option answers to, such as that of a published program; the help names it."""

    name: str
    told: ClassVar[bool] = False


@dataclass(frozen=True)
class Former(Also):
    """The name that an option had: it still works, and a line on standard error says the present one."""

    told: ClassVar[bool] = True


@dataclass(frozen=True)
class Else:
    """What holds when an option is not given, for the help."""

    text: str


class Verb(TyperCommand):
    """A command. ``others``: further names of its options, by parameter."""

    others: ClassVar[Mapping[str, tuple[Also, ...]]] = {}

    def make_parser(self, ctx: Any) -> Any:
        """Of all names of the options."""
        parser = super().make_parser(ctx)
        for param in self.params:
            for other in self.others.get(param.name or "", ()):
                alias = copy(param)
                alias.opts, alias.secondary_opts = [other.name], []
                alias.add_to_parser(parser, ctx)
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses, and says which of the names are former ones."""
        if not ctx.resilient_parsing:
            for line in self._former(args):
                print(f"featureinterp: {line}", file=sys.stderr)
        raw = list(args)
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            self._say_value(error, ctx, raw)
            raise

    def _say_value(self, error: TyperException, ctx: Any, args: list[str]) -> None:
        """Adds to an error which value it is about."""
        param = getattr(error, "param", None)
        if param is None:
            return
        value = self.make_parser(ctx).parse_args(args)[0].get(param.name)
        if value is not None and repr(value) not in error.message:
            reason = error.message.partition(", unable to parse")[0]
            error.message = f"{value!r}: {reason[:1].lower()}{reason[1:]}"

    def _former(self, args: list[str]) -> Iterator[str]:
        options = args[: args.index("--")] if "--" in args else args
        given = {arg.partition("=")[0] for arg in options}
        for param in self.params:
            for other in self.others.get(param.name or "", ()):
                if other.told and other.name in given:
                    yield f"{other.name} is now {param.opts[0]}; the former name still works"

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The docstring, paragraph by paragraph; no line breaks within the name of an option."""
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                example = paragraph.startswith("Example: ")
                _write(formatter, " ".join(paragraph.split()), " " * 9 if example else "")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options under their headings, with the other names that are no former ones."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            of_argument = param.param_type_name == "argument"
            heading = getattr(param, "rich_help_panel", None) or ("Arguments" if of_argument else "Options")
            names = [o.name for o in self.others.get(param.name or "", ()) if not o.told]
            also = f"  [also: {', '.join(names)}]" if names else ""
            sections.setdefault(heading, []).append((record[0], record[1] + also))
        known = [h for h in HEADINGS if h in sections]
        for heading in (*known, *(h for h in sections if h not in known)):
            rows = sections[heading]
            with formatter.section(heading):
                _columns(formatter, rows)


def _write(formatter: Any, text: str, further: str = "") -> None:
    indent = " " * formatter.current_indent
    for line in textwrap.wrap(
        text,
        formatter.width,
        initial_indent=indent,
        subsequent_indent=indent + further,
        break_on_hyphens=False,
        break_long_words=False,
    ):
        formatter.write(line + "\n")


def _columns(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """Names on the left, what they mean on the right."""
    first = min(_FIRST_COLUMN, max(len(name) for name, _ in rows))
    left = formatter.current_indent + first + _GAP
    for name, text in rows:
        lines = textwrap.wrap(
            text, formatter.width - left, break_on_hyphens=False, break_long_words=False
        ) or [""]
        start = " " * formatter.current_indent + name
        if len(name) <= first:
            formatter.write(f"{start.ljust(left)}{lines.pop(0)}".rstrip() + "\n")
        else:
            formatter.write(start + "\n")
        for line in lines:
            formatter.write(" " * left + line + "\n")


def add(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Makes a function a verb of the program; see :func:`flattened`."""
    flat, others = flattened(function)
    app.command(name, cls=type("Verb", (Verb,), {"others": others}))(flat)


def flattened(function: Callable[..., None]) -> tuple[Callable[..., None], dict[str, tuple[Also, ...]]]:
    """A function for typer, and the further names of its options by parameter. A parameter whose type is a
    dataclass of options stands for all of them."""
    hints = get_type_hints(function, include_extras=True)
    found: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    others: dict[str, tuple[Also, ...]] = {}

    def declare(name: str, annotation: Any, default: Any) -> None:
        declared, also = _declared(annotation)
        if also:
            others[name] = also
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(name, kind, default=default, annotation=declared))

    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and is_dataclass(hint):
            kinds = get_type_hints(hint, include_extras=True)
            groups[parameter.name] = (hint, [field.name for field in fields(hint)])
            for field in fields(hint):
                declare(field.name, kinds[field.name], field.default)
        else:
            declare(parameter.name, hint, parameter.default)

    def flat(**given: Any) -> None:
        for name, (group, names) in groups.items():
            given[name] = group(**{each: given.pop(each) for each in names})
        function(**given)

    flat.__name__, flat.__doc__, flat.__module__ = function.__name__, function.__doc__, function.__module__
    flat.__annotations__ = {p.name: p.annotation for p in found}
    flat.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    return flat, others


def _declared(annotation: Any) -> tuple[Any, tuple[Also, ...]]:
    """An annotation as typer takes it, and the other names in it."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    kind, *more = get_args(annotation)
    shown = [m.text for m in more if isinstance(m, Else)]
    kept = [copy(m) if isinstance(m, OptionInfo) else m for m in more if not isinstance(m, Also | Else)]
    for option in kept:
        if shown and isinstance(option, OptionInfo):
            option.show_default = shown[-1]
    return Annotated[(kind, *kept)], tuple(m for m in more if isinstance(m, Also))
