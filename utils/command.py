"""How a script's ``main(argv)`` ends: with a result, or with a message and an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

from utils import signals
from utils.console import keep_early, plain, show_rest
from utils.errors import DISK, Diverged, Unsaved, UsageError, disk_words

T = TypeVar("T")


def command(main: Callable[..., T]) -> Callable[..., T]:
    """Wraps a script's ``main(argv)``: a mistake of the user's ends in its message and an exit status, no traceback."""

    @wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> T:
        for stream in (sys.stdout, sys.stderr):  # a "±" must not end a run where the locale has none
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        keep_early()
        with signals.handled():
            try:
                result = main(sys.argv[1:] if argv is None else list(argv))
                show_rest()
                return result
            except UsageError as error:
                status, message = 2, str(error)
            except (Diverged, Unsaved) as error:
                status, message = 1, f"stopped: {error}"
            except KeyboardInterrupt as error:
                notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
                status, message = getattr(error, "status", 130), f"\nended by {str(error) or 'SIGINT'}{notes}"
            except BrokenPipeError:  # the reader of our output has gone, as in "| head"
                sys.stdout = open(os.devnull, "w")
                status, message = 141, "stopped: standard output was closed"
            except MemoryError as error:
                words = f" ({' '.join(str(error).split())})" if str(error) else ""
                status, message = 1, f"stopped: out of memory{words}"
            except OSError as error:
                if error.errno not in DISK:
                    raise
                status, message = 1, f"stopped: {disk_words(error)}"
            except Exception:
                number = signals.requested()
                if number is None:
                    raise
                # the signal came where something made another error of it, the import of a library for instance
                status, message = 128 + number, f"\nended by {signal.Signals(number).name}"
        with contextlib.suppress(OSError):  # nobody listens
            print(plain(message), file=sys.stderr)
        raise SystemExit(status)

    return wrapper
