"""What an output can show: a character that its encoding lacks gets the nearest one that it has.

A terminal or a log may be ASCII or Latin-1. Telling of a run must not end it, and a table of
shades is of use there too.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import unicodedata
from typing import Any

NEAREST = "fedsim-nearest"
"""Name of the error handler, for `str.encode` and streams."""
_LOOK_LIKE = {
    **dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True)),
    **dict.fromkeys("─━╸╺╴╶‐‑‒–—―−", "-"),
    **dict.fromkeys("│┃╎╏", "|"),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("“”„″", '"'),
    "…": "...",
    "×": "x",
    "·": ".",
    "•": "*",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "ß": "ss",
    "ø": "o",
    "Ø": "O",
    "æ": "ae",
    "Æ": "AE",
    "ł": "l",
    "Ł": "L",
}


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if known := _LOOK_LIKE.get(character):
        return known
    # An accented letter is a letter and its accent.
    parts = unicodedata.normalize("NFKD", character)
    return parts.encode("ascii", "ignore").decode() or "?"


codecs.register_error(NEAREST, _nearest)


def show_nearest(stream: Any) -> None:
    """Let a stream of this program write any text, instead of raising `UnicodeEncodeError`."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors=NEAREST)


class Shown:
    """Writes any text to a stream that is not ours to change; for the rest it is the stream.

    Parameters
    ----------
    stream : file-like
        Where to write.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text as far as the stream can show it."""
        if encoding := getattr(self._stream, "encoding", None):
            with contextlib.suppress(LookupError):
                text = text.encode(encoding, NEAREST).decode(encoding)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
