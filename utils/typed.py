"""Whether what a file holds is of the type that it should be."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def require(value: object, hint: type[T], what: str) -> T:
    """The value itself, where it is of a type as it may be annotated; TypeError where not."""
    if not fits(value, hint):
        raise TypeError(f"{what}: {type(value).__name__}")
    return typing.cast(T, value)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type: a class, a TypedDict, Literal, a union, or list, tuple and dict of such.

    An int is a float too, a bool is neither, and a list may stand for a tuple of so many values, as in JSON.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if hint is float or hint is int:
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(fits(each, parts[0]) for each in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if typing.is_typeddict(hint):
        fields = typing.get_type_hints(hint)
        is_whole = isinstance(value, dict) and hint.__required_keys__ <= value.keys() <= fields.keys()
        return is_whole and all(fits(each, fields[key]) for key, each in value.items())  # type: ignore[attr-defined]
    return isinstance(value, hint)
