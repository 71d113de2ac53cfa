"""What the content of a folder is of.

``request.json`` is a sealed map with one entry per kind of content that the folder holds: what was asked for,
the hash of it (``key``), and ``about``, names that may change while the content stays. :func:`claim` writes a
kind's entry down, and refuses a folder whose content of that kind is of something else, or whose content of
another kind lies where this one would go.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featureinterp.claims.contents import CONTENTS, WINDOWS, WINDOWS_ASKED, Content
from featureinterp.claims.owners import replacing
from featureinterp.errors import DamagedStoreError, IncompatibleError
from featureinterp.files import content_key, explained_storage, parse_json
from featureinterp.stored.sums import described, read_marker, write_marker

REQUEST = "request.json"
_CONTENTS = "contents"
_SHOWN = 3


Entry = dict[str, Any]


def claim(
    folder: Path,
    content: Content,
    asked: Mapping[str, Any],
    *,
    about: Mapping[str, Any] | None = None,
    replace: bool = False,
    earlier: Callable[[], Mapping[str, Any] | None] = lambda: None,
    anew: str = "start anew with --replace",
    options: Mapping[str, str] | None = None,
    alike: Callable[[Entry, Entry], Entry] = lambda found, wanted: wanted,
) -> None:
    """Writes down what the content of ``folder`` is of, or finds the same request there.

    ``asked``: all that the content depends on, as plain data, by names that a person reads; hashes for what
    is large. ``about``: names that may change while the content stays. ``replace``: parts that are of another
    request are deleted, and nothing else: neither content of another kind nor windows that it shares.
    ``earlier``: the request of parts that ``request.json`` does not know, None when it cannot be known.
    ``anew``: what to do to start anew there. ``options``: for what may differ ("dtype") the option that asks
    for what is there, with ``{}`` for the value; ``alike``: from the request that is there and this one, this
    one with what would be the same when those options were given.

    Raises ``IncompatibleError`` that says what differs when ``folder`` holds another request's parts and
    ``replace`` is off, or content of another kind in the same place; ``DamagedStoreError`` when
    ``request.json`` is damaged and the parts do not say themselves what they are of; and ``FolderInUseError``
    when what is to be deleted is being read. Call it within :func:`featureinterp.claims.owned`.
    """
    wanted = _plain(asked)
    path = folder / REQUEST
    with explained_storage(folder):
        entries, damage = _known(path, f"put it back, give another folder, or {anew}")
        others = [other for other in CONTENTS if other != content and _holds(folder, other, content, entries)]
        _check_shared(folder, content, wanted, others, entries)
        shared = {part for other in others for part in other.parts}
        there = [folder / part for part in content.parts if part not in shared and _exists(folder / part)]
        entry = entries.get(content.name) if damage is None else None
        found = None if entry is None else entry["asked"]
        if found is None and there:
            found = _told(earlier, replace)
        if found != wanted and there:
            if not replace:
                if found is None and damage is not None:
                    raise damage
                near = wanted if found is None else alike(found, wanted)
                raise IncompatibleError(_difference(folder, content, found, near, anew, options or {}))
            with replacing(folder, content, there):
                _write(path, {name: e for name, e in entries.items() if name != content.name})
                for old in there:
                    _delete(old)
        if entry is None or found != wanted:
            mine = {"key": content_key(wanted), "asked": wanted, "about": dict(about or {})}
            _write(path, {**entries, content.name: mine})


def asked_in(folder: Path, content: Content) -> dict[str, Any] | None:
    """What content of a kind in ``folder`` is of, as :func:`claim` wrote it down; None when that does not say
    it. Raises ``DamagedStoreError`` for a damaged ``request.json``.
    """
    entry = _entries(folder / REQUEST, "put it back, or delete it").get(content.name)
    return None if entry is None else dict(entry["asked"])


def _told(earlier: Callable[[], Mapping[str, Any] | None], replace: bool) -> dict[str, Any] | None:
    """What parts say themselves that they are of. Damaged ones may be replaced."""
    try:
        known = earlier()
    except DamagedStoreError:
        if not replace:
            raise
        return None
    return None if known is None else _plain(known)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return found


def _write(path: Path, entries: Mapping[str, Entry]) -> None:
    write_marker(path, {_CONTENTS: dict(entries)})


def _known(path: Path, remedy: str) -> tuple[dict[str, Entry], DamagedStoreError | None]:
    """The entries of ``request.json``, or, with what is wrong, those of a damaged one that prove
    themselves.
    """
    try:
        return _entries(path, remedy), None
    except DamagedStoreError as error:
        return _intact(path), error


def _entries(path: Path, remedy: str) -> dict[str, Entry]:
    """What ``request.json`` says, by name of the content; nothing when there is none. One of an earlier
    version is one entry by itself, which says by its names what it is of.

    Raises ``DamagedStoreError`` for one that is not what was written: its checksum says so, or a key.
    """
    if not path.exists():
        return {}
    found = read_marker(path, remedy).value
    if _CONTENTS not in found and "about" not in found:
        return {}
    with described(path, remedy):
        if _CONTENTS in found:
            entries = {str(name): dict(entry) for name, entry in found[_CONTENTS].items()}
        else:
            asked = {name: value for name, value in found.items() if name not in ("key", "about")}
            entries = {
                _kind_of(asked): {"key": found.get("key"), "asked": asked, "about": dict(found["about"])}
            }
        wrong = [name for name, entry in entries.items() if entry["key"] != content_key(entry["asked"])]
    if wrong:
        raise DamagedStoreError(
            f"{path} is damaged: the key of its {wrong[0] or 'content'} is not that of its content; {remedy}"
        )
    entries.pop("", None)
    return entries


def _kind_of(asked: Mapping[str, Any]) -> str:
    """The name of the kind that a request is of; "" when there is none."""
    return next((content.name for content in CONTENTS if content.asks <= asked.keys()), "")


def _intact(path: Path) -> dict[str, Entry]:
    """The entries of a damaged ``request.json`` whose keys are those of what they ask for."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {
            name: {"key": entry["key"], "asked": entry["asked"], "about": {}}
            for name, entry in parse_json(path.read_bytes())[_CONTENTS].items()
            if isinstance(entry["asked"], dict) and entry["key"] == content_key(entry["asked"])
        }
    return {}


def _holds(folder: Path, other: Content, content: Content, entries: Mapping[str, Entry]) -> bool:
    """Whether a folder holds content of another kind than ``content``, beside what both may have."""
    if other.name not in entries and not (other.mark and _exists(folder / other.mark)):
        return False
    own = [part for part in other.parts if part not in content.parts] or other.parts
    return any(_exists(folder / part) for part in own)


def _check_shared(
    folder: Path,
    content: Content,
    wanted: Mapping[str, Any],
    others: Sequence[Content],
    entries: Mapping[str, Entry],
) -> None:
    """Raises ``IncompatibleError`` when other content has a place that ``content`` needs, unless that is
    windows, and both are of the same ones (where it is not known of which, the windows say it themselves).
    """
    for other in others:
        common = [part for part in content.parts if part in other.parts]
        if common and common != [WINDOWS]:
            raise IncompatibleError(
                f"{folder} holds {other.words}, and {content.words} would write over its {common[0]}: give "
                "another folder"
            )
        theirs = entries.get(other.name)
        if not common or theirs is None:
            continue
        there, here = (
            {name: asked.get(name) for name in WINDOWS_ASKED} for asked in (theirs["asked"], wanted)
        )
        if differences := [says for _, says, _ in _differences(there, here)]:
            raise IncompatibleError(
                f"{folder} holds {other.words} of other windows ({'; '.join(differences[:_SHOWN])}), and "
                f"{content.words} would need theirs in the same place: give another folder"
            )


def _difference(
    folder: Path,
    content: Content,
    found: dict[str, Any] | None,
    wanted: dict[str, Any],
    anew: str,
    options: Mapping[str, str],
) -> str:
    if found is None:
        return (
            f"{folder} holds {content.words}, and does not say of which request (an earlier version wrote "
            f"them): give another folder, or {anew}"
        )
    differences = list(_differences(found, wanted))
    shown = "; ".join(says for _, says, _ in differences[:_SHOWN])
    more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    ways = [
        options[place].format(value)
        for place, _, value in differences
        if place in options and isinstance(value, str)
    ]
    on = f"go on there with {' and '.join(ways)}, " if len(ways) == len(differences) else ""
    return (
        f"{folder} holds {content.words} of another request ({shown}{more}): {on}give another folder, or "
        f"{anew}"
    )


def _differences(found: Any, wanted: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """What differs between two requests: where, in words, and what is there."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys((*wanted, *found)):
            yield from _differences(found.get(name), wanted.get(name), f"{place} {name}".strip())
    elif _says_something(found) and _says_something(wanted):
        there, here = (json.dumps(value, ensure_ascii=False) for value in (found, wanted))
        yield place, f"{place} {there} there, {here} asked for", found
    else:
        yield place, f"another {place}", found


def _says_something(value: Any) -> bool:
    """Whether a value says something to a person: no hash, and not long."""
    text = str(value)
    return len(text) <= 60 and not (len(text) >= 16 and all(c in "0123456789abcdef" for c in text))


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
