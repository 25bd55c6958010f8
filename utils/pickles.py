"""What a pickle would do, found out without doing it: the steps of a checkpoint are read before torch runs them.

torch.load(weights_only=True) builds tensors and plain values alone, but takes memory and time without bound for them.
"""

from __future__ import annotations

import encodings.aliases
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
#: Steps that put a plain value on the stack.
_SCALARS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "FLOAT", "NONE", "NEWTRUE", "NEWFALSE", "LONG", "LONG1", "INT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"}
#: Codecs that are slow, or make more of what they have made; :mod:`encodings` has other names for them.
_GROW = {"hex", "base64", "zlib", "bz2", "uu", "quopri", "rot_13", "idna", "punycode"}
_GROW |= {f"{name}_codec" for name in _GROW}
_GROW |= {other for other, name in encodings.aliases.aliases.items() if name in _GROW}
#: How often a tuple that holds tuples may be taken again from a pickle's memo: as a key, each time doubles its hashing.
MOST_SHARED = 20


class Hostile(ValueError):
    """A pickle that asks for more than a checkpoint can need; str() says what."""


def check_pickles(blob: bytes, number: int = 1) -> None:
    """Reads so many pickles that follow each other.

    Raises:
        Hostile: see above.
        ValueError, LookupError: one is damaged.
    """
    place = steps = large = shared = 0
    has_codec = b"_codecs" in blob
    for _ in range(number):
        if place == len(blob):
            break  # fewer than a file of torch.save has, which torch then says
        latest: deque[bool] = deque(maxlen=3)  # whether what was put on the stack is plain
        is_plain = True  # so since the last mark
        memo: dict[int, str] = {}  # a tuple is "flat", of plain values, or "deep"; others are ""
        made = name = ""
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
            content = blob[start:place]
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[_number(name, content, len(memo))] = made
                continue
            made, is_scalar = "", name in _SCALARS or name in _TEXTS
            if name == "MARK":
                is_plain = True
                continue
            if name in ("GLOBAL", "INST"):
                if content.split()[-1:] == [b"bytearray"]:
                    raise Hostile("it asks for memory that it does not fill")
            elif name in ("LONG", "LONG1", "LONG4", "INT"):
                large += len(content) > 4
                if large > MOST_LONG or len(content) > MOST_DIGITS:
                    raise Hostile("it holds numbers that no checkpoint has")
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                kind = memo.get(_number(name, content, -1), "")
                is_scalar = not kind  # or a list, which is no key
                shared += kind == "deep"
                if shared > MOST_SHARED:
                    raise Hostile("it holds tuples within tuples without end")
            elif name.startswith("TUPLE"):
                parts = list(latest)[-int(name[5:]) :] if name[5:] else [is_plain]
                made = "flat" if all(parts) else "deep"
            elif has_codec and name in _TEXTS:
                text = content.decode("utf-8" if "UNICODE" in name and name != "UNICODE" else "raw_unicode_escape")
                if encodings.normalize_encoding(text.strip("\n'\"")).lower() in _GROW:
                    raise Hostile(f"it asks for text in the form {text[:40]!r}")
            latest.append(is_scalar)
            is_plain &= is_scalar


def _number(name: str, content: bytes, otherwise: int) -> int:
    """The place in the memo that a step names."""
    if not content:
        return otherwise
    return int(content) if name in ("PUT", "GET") else int.from_bytes(content, "little")
