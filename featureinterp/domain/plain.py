"""The plain form of values, as JSON takes it: made and read by the fields that a class declares, so that no
field is listed twice and none is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

import pydantic
from pydantic_core import CoreSchema, core_schema


class Plain:
    """A dataclass with a plain form. A field that the class does not declare is an error when it is read."""

    __slots__ = ()
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    def to_json(self) -> Any:
        """A JSON-serialisable form that :meth:`from_json` reads back to an equal value."""
        return _adapter(type(self)).dump_python(self, mode="json", warnings="error")

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what :meth:`to_json` wrote. Raises ``pydantic.ValidationError``, a ``ValueError``, for what
        is none of it.
        """
        read: Self = _adapter(cls).validate_python(value)
        return read


class AsRow:
    """In ``Annotated``: the dataclass is written as the list of its fields' values, without their names."""

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: pydantic.GetCoreSchemaHandler
    ) -> CoreSchema:
        names = [f.name for f in fields(source)]

        def read(value: Any) -> Any:
            if not isinstance(value, Sequence) or isinstance(value, str):
                return value
            if len(value) > len(names):
                raise ValueError(f"{len(value)} values for the {len(names)} fields of {source.__name__}")
            return dict(zip(names, value, strict=False))

        return _written(handler(source), read, lambda plain: list(plain.values()))


class OfOneField(Plain):
    """A dataclass with one field, which is written as that field's value."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: pydantic.GetCoreSchemaHandler
    ) -> CoreSchema:
        [field] = fields(source)

        def read(value: Any) -> Any:
            return value if isinstance(value, (source, Mapping)) else {field.name: value}

        return _written(handler(source), read, lambda plain: plain[field.name])


def _written(schema: CoreSchema, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> CoreSchema:
    """``schema`` with another plain form: ``read`` gives its own from that, ``write`` that from its own."""
    return core_schema.no_info_before_validator_function(
        read,
        schema,
        serialization=core_schema.wrap_serializer_function_ser_schema(
            lambda value, plain: write(plain(value)), schema=schema
        ),
    )


_ADAPTERS: dict[type[Any], pydantic.TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> pydantic.TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = pydantic.TypeAdapter(cls)
    return _ADAPTERS[cls]
