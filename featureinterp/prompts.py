"""Prompts are files: ``prompts/<task>/<version>/``. They are rendered strictly, and their hash goes into
every result.

A ``.j2`` file is a Jinja template in which an unknown name is an error; what is put into it is inserted as it
is, and never read as a template itself. Text from a corpus goes through :func:`escape` first, so that it can
hold no line break, tab or mark.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from featureinterp.errors import InputError, UnknownNameError
from featureinterp.files import parse_json
from featureinterp.resources import prompts_folder
from featureinterp.visible import UNSEEN

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_BACK = {v[1]: k for k, v in _ESCAPES.items()} | {"<": "<", ">": ">", "|": "|"}
_UNSAFE = re.compile(UNSEEN.pattern + r"|(\\|<(?=<)|(?<=<)<|>(?=>)|(?<=>)>)")
_UNSAFE_BY_A_MARK = re.compile(_UNSAFE.pattern + r"|(\A[<>]|[<>]\Z)")
_ESCAPED = re.compile(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|.)")
SEPARATOR = " | "
"""Between the tokens of a list in a prompt; :func:`listed` keeps it out of the tokens."""


@dataclass(frozen=True)
class Prompt:
    """The files of one version of one prompt, by file name."""

    task: str
    version: str
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        """``task/version``."""
        return f"{self.task}/{self.version}"

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names and contents of all files, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(sorted(self.files.items())).encode()).hexdigest()[:16]

    def text(self, file: str) -> str:
        """A file as it is, without white space at its end."""
        return self.files[file].rstrip()

    def json(self, file: str) -> Any:
        """A JSON file's value."""
        return parse_json(self.files[file])

    def with_examples(self, file: str, path: Path) -> Prompt:
        """The prompt with the JSON list of worked examples at ``path`` in place of ``file``; its hash is
        another. Raises ``InputError`` when it cannot be read or its examples lack a field that those of
        ``file`` have."""
        try:
            text = path.read_text(encoding="utf-8")
            examples = parse_json(text)
        except (OSError, ValueError) as error:
            raise InputError(f"the worked examples {path} cannot be read: {error}") from error
        wanted = set(self.json(file)[0])
        if not isinstance(examples, list) or not all(
            isinstance(e, dict) and wanted <= set(e) for e in examples
        ):
            raise InputError(
                f"the worked examples {path} are no list of objects with the fields "
                f"{', '.join(sorted(wanted))}"
            )
        return replace(self, files={**self.files, file: text})

    def render(self, file: str, **values: Any) -> str:
        """A template filled in. Raises ``jinja2.UndefinedError`` when it names a value that is not given."""
        import jinja2

        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701 (a prompt is no page)
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.from_string(self.files[file]).render(**values).rstrip()


def load_prompt(task: str, version: str) -> Prompt:
    """Reads a prompt's files. Raises ``UnknownNameError`` with the versions that exist."""
    folder = prompts_folder() / task / version
    if not folder.is_dir():
        there = (
            sorted(p.name for p in (prompts_folder() / task).glob("*"))
            if (prompts_folder() / task).is_dir()
            else []
        )
        raise UnknownNameError(
            f"there is no prompt {task}/{version}: "
            + (f"versions of {task} are {', '.join(there)}" if there else "check the task's name")
        )
    return Prompt(
        task,
        version,
        {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.iterdir()) if p.is_file()},
    )


def escape(text: str) -> str:
    r"""A text on one line: backslashes, tabs, line breaks, characters that cannot be seen
    (:mod:`featureinterp.visible`), and angle brackets that stand beside another of their kind get a backslash
    form. :func:`unescape` gives the text back."""
    return _UNSAFE.sub(_backslashed, text)


def listed(token: str) -> str:
    """A token as one of a list with :data:`SEPARATOR` between them: :func:`escape`, and a bar in it gets a
    backslash, too.
    """
    return escape(token).replace("|", "\\|")


def _backslashed(match: re.Match[str]) -> str:
    found = match[0]
    if match.lastindex is None:  # a joiner in its place
        return found
    code = ord(found)
    return _ESCAPES.get(found) or (
        f"\\{found}" if found in "<>" else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def unescape(text: str) -> str:
    """Undoes :func:`escape` and :func:`listed`."""
    return _ESCAPED.sub(lambda m: chr(int(m[1][1:], 16)) if len(m[1]) > 1 else _BACK.get(m[1], m[0]), text)


def marked(pieces: Sequence[str], marks: Sequence[bool]) -> str:
    """A window's text on one line with each run of marked tokens between ``<<`` and ``>>``; marks of the text
    itself are escaped.
    """
    out = []
    for on, run in itertools.groupby(zip(marks, pieces, strict=True), key=lambda pair: pair[0]):
        text = _UNSAFE_BY_A_MARK.sub(_backslashed, "".join(piece for _, piece in run))
        out.append(f"<<{text}>>" if on else text)
    return "".join(out)
