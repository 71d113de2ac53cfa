"""Fields of settings that had another name: files and calls that use it go on working."""

from __future__ import annotations


class _Former(int):
    """A value that was read under a field's former name, as :func:`dataclasses.replace` does, which must not
    overrule the field.
    """


def readable_as(former: str, name: str, kind: type) -> None:
    """Lets the field ``name`` of a dataclass be read under its former name, too."""
    setattr(kind, former, property(lambda self: _Former(getattr(self, name))))


def is_read(value: object) -> bool:
    """Whether a value was read under a former name."""
    return isinstance(value, _Former)


def take(settings: object, **given: int | None) -> None:
    """Gives fields of a frozen dataclass what came under their former names; None: nothing came."""
    for name, value in given.items():
        if value is not None and not is_read(value):
            object.__setattr__(settings, name, value)
