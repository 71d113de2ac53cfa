"""Text from elsewhere as a terminal or a page may show it: what would steer the reader's screen, or hide, is
shown as an escape.

Shown as escapes are control characters (C0 and C1, so that no terminal sequence is left whole), line and
paragraph separators, characters without a width of their own that reorder, join or hide text (Unicode's
default ignorable code points, bidirectional controls among them), lone surrogates, and code points that are
no characters. Joiners and selectors within an emoji, or between letters of scripts that need them (Arabic and
Indic ones), stay. What is shown is for reading: it is never read back (:func:`featureinterp.prompts.escape`
can be undone).
"""

from __future__ import annotations

import re

_CONTROL = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029"
_IGNORABLE = (
    "\\xad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\u3164"
    "\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff0-\\ufffb\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a\\U000e0000-\\U000e0fff"
)
_NO_CHARACTER = "\\ud800-\\udfff\\ufdd0-\\ufdef" + "".join(
    f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17)
)
_SYMBOL = (
    "\\xa9\\xae\\u203c\\u2049\\u2122\\u2139\\u2190-\\u2bff\\u3030\\u303d\\u3297\\u3299\\U0001f000-\\U0001faff"
)
_JOINING = "\\u0620-\\u08ff\\u0900-\\u0dff"
_IN_PLACE = (
    f"(?<=[#*0-9{_SYMBOL}])\\ufe0f|(?<=[{_SYMBOL}\\ufe0f])\\u200d(?=[{_SYMBOL}])"
    f"|(?<=[{_JOINING}])[\\u200c\\u200d](?=[{_JOINING}])"
)
UNSEEN = re.compile(f"{_IN_PLACE}|([{_CONTROL}{_IGNORABLE}{_NO_CHARACTER}])")
"""What is shown as an escape is its group 1; a joiner or selector that is in its place matches without it."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with every character that cannot be seen as an escape: ``\n``, ``\t``, ``\r``, ``\x1b``,
    ``\u202e``, ``\U000e0041``.

    ``keep``: characters that stay as they are, a line break for example.
    """
    return UNSEEN.sub(lambda m: m[0] if m[1] is None or m[1] in keep else escaped(m[1]), text)


def escaped(character: str) -> str:
    r"""One character as an escape, in the shortest of the forms above."""
    code = ord(character)
    short = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return short or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def visible_json(text: str) -> str:
    """A JSON document with the same characters as JSON's own escapes, so that its value stays what it is.
    Line breaks and tabs that it is laid out with stay."""
    return UNSEEN.sub(lambda m: m[0] if m[1] is None or m[1] in "\n\t\r" else _units(m[1]), text)


def _units(character: str) -> str:
    raw = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{raw[i : i + 4]}" for i in range(0, len(raw), 4))
