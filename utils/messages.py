"""What processes tell each other, as JSON: it comes over a network, so nothing in it can be more than a plain value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from utils.errors import Diverged, Unsaved, UsageError

#: Bytes of a message, at most.
LONGEST = 2**24
#: Errors that can be sent: name -> what makes one of the values that were sent, and of what kinds those are.
ERRORS: dict[str, tuple[Callable[..., Exception], tuple[type, ...]]] = {
    "UsageError": (UsageError, (str, str)),
    "Diverged": (Diverged, (str,)),
    "Unsaved": (Unsaved, (str,)),
    "OSError": (OSError, (str,)),
}


def pack(value: object) -> str:
    """A message: None, numbers, text, lists, tuples, dicts with text for keys, paths, and :data:`ERRORS`.

    Raises:
        TypeError: something else.
        UsageError: it is longer than :data:`LONGEST`.
    """
    text = json.dumps(_plain(value))
    if len(text) > LONGEST:
        raise UsageError(f"a message of {len(text):,} bytes to other processes", f"up to {LONGEST:,}")
    return text


def unpack(blob: bytes) -> object:
    """The value of a message; UsageError where it is none, as of a program that is not one of us."""
    try:
        if len(blob) > LONGEST:
            raise ValueError
        return _value(json.loads(blob))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(
            "a message that is of none of the processes of this run",
            "a rendezvous address (--rdzv-endpoint, MASTER_PORT) that no other program writes to",
        ) from None


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(each) for key, each in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, Path):
        return {"path": str(value)}
    for name, (kind, _) in ERRORS.items():
        if isinstance(value, Exception) and isinstance(value, kind):  # type: ignore[arg-type]
            arguments: tuple[object, ...] = value.args
            if isinstance(value, OSError):  # of some, as urllib's, there is only a text
                arguments = (str(value),) if value.errno is None else (value.errno, value.strerror, value.filename)
            plain = [each if each is None or isinstance(each, int) else str(each) for each in arguments]
            return {"error": [name, *plain]}
    raise TypeError(f"{type(value).__name__} is no message")


def _value(content: object) -> object:
    if isinstance(content, list):
        return [_value(each) for each in content]
    if not isinstance(content, dict):
        return content
    ((kind, inner),) = content.items()
    if kind == "dict":
        return {key: _value(each) for key, each in inner.items()}
    if kind == "tuple":
        return tuple(_value(each) for each in inner)
    if kind == "path":
        return Path(inner)
    if kind == "error":
        name, *arguments = inner
        kinds = (int, str, str | None) if name == "OSError" and len(arguments) > 1 else ERRORS[name][1]
        if len(arguments) > len(kinds) or not all(map(isinstance, arguments, kinds)):
            raise ValueError
        return ERRORS[name][0](*arguments)
    raise ValueError
