"""What a pickle would do, found out without doing it: the steps of a checkpoint are read before torch runs them.

torch.load(weights_only=True) builds tensors and plain values alone, but takes memory and time without bound for them.
"""

from __future__ import annotations

import codecs
import pickletools
from collections import deque

#: Steps of a pickle, and numbers of more than 32 bits in it, at most: of those a dict may be made whose keys collide.
MOST_STEPS, MOST_LONG = 2_000_000, 10_000
#: Bytes of a whole number, at most.
MOST_DIGITS = 64
#: {step: its name and the bytes of its argument}; negative for pickletools' words for other lengths.
_STEPS = {
    ord(step.code): (step.name, step.arg.n if step.arg else 0) for step in pickletools.opcodes
}  # fmt: skip
#: Bytes of the length that stands before an argument.
_PREFIX = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
#: Steps that put nothing on the stack that could be an argument of a call, by far the most of a file.
_QUIET = {"BININT", "BININT1", "BININT2", "BINFLOAT", "MARK", "NONE", "EMPTY_LIST", "EMPTY_DICT", "APPENDS", "SETITEMS"}


class Hostile(ValueError):
    """A pickle that asks for more than a checkpoint can need; str() says what."""


def check_pickles(blob: bytes, number: int = 1) -> None:
    """Reads so many pickles that follow each other.

    Raises:
        Hostile: see above.
        ValueError, LookupError: one is damaged.
    """
    place = steps = large = 0
    has_codec, growing = False, ""
    for _ in range(number):
        if place == len(blob):
            break  # fewer than a file of torch.save has, which torch then says
        latest: deque[str | None] = deque(maxlen=3)  # what a tuple of arguments is made of
        memo: dict[int, str | None] = {}
        name = ""
        while name != "STOP":
            name, length = _STEPS[blob[place]]
            place, steps = place + 1, steps + 1
            if steps > MOST_STEPS:
                raise Hostile(f"more than {MOST_STEPS:,} steps beside its tensors")
            start = place
            if length == pickletools.UP_TO_NEWLINE:
                place = blob.index(b"\n", place) + 1
                if name in ("GLOBAL", "INST"):  # two lines
                    place = blob.index(b"\n", place) + 1
            elif length < 0:
                start += _PREFIX[length]
                place = start + int.from_bytes(blob[place:start], "little")
            else:
                place += length
            if place > len(blob):
                raise ValueError("cut off")
            if name in _QUIET:
                latest.append(None)
                continue
            content = blob[start:place]
            if name in ("GLOBAL", "INST"):
                has_codec |= content.split() == [b"_codecs", b"encode"]
                if content.split()[-1:] == [b"bytearray"]:
                    raise Hostile("it asks for memory that it does not fill")
                latest.append(None)
            elif name == "STACK_GLOBAL":
                return  # torch.save never does so, and torch.load refuses it
            elif name in ("LONG", "LONG1", "LONG4", "INT"):
                large += len(content) > 4
                if large > MOST_LONG or len(content) > MOST_DIGITS:
                    raise Hostile("it holds numbers that no checkpoint has")
                latest.append(None)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[_number(name, content, len(memo))] = latest[-1] if latest else None
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                latest.append(memo.get(_number(name, content, -1)))
            elif name.startswith("TUPLE"):
                growing = next((each for each in latest if each and _grows(each)), growing)
                latest.append(None)
            else:
                latest.append(content.decode("latin1").strip() if len(content) < 40 else None)
        if has_codec and growing:
            raise Hostile(f"it asks for text in the form {growing!r}")


def _number(name: str, content: bytes, otherwise: int) -> int:
    """The place in the memo that a step names."""
    if not content:
        return otherwise
    return int(content) if name in ("PUT", "GET") else int.from_bytes(content, "little")


def _grows(name: str) -> bool:
    """Whether text is encoded so by a codec that is slow, or makes more of its own result."""
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError, UnicodeError):
        return False
    return not found._is_text_encoding or found.name in ("idna", "punycode")
