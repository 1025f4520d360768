"""Texts on outputs that cannot show all of them."""

from __future__ import annotations

import io

import pytest

from fedsim.core.characters import NEAREST, Shown, show_nearest

ODD = "▁▄█ Zoë Łódź 東京 1…2 \udcff ─"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", ".=@ Zoe Lodz ?? 1...2 ? -"),
        ("latin-1", ".=@ Zoë Lódz ?? 1...2 ? -"),
        ("utf-8", "▁▄█ Zoë Łódź 東京 1…2 ? ─"),
    ],
)
def test_what_an_encoding_lacks_is_shown_by_the_nearest(encoding: str, shown: str) -> None:
    assert ODD.encode(encoding, NEAREST).decode(encoding) == shown
    raw = io.BytesIO()
    ours = io.TextIOWrapper(raw, encoding=encoding)
    show_nearest(ours)
    ours.write(ODD)
    ours.flush()
    assert raw.getvalue().decode(encoding) == shown
    theirs = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream = Shown(theirs)
    stream.write(ODD)
    stream.flush()
    assert theirs.buffer.getvalue().decode(encoding) == shown  # type: ignore[attr-defined]
    assert theirs.errors == "strict"


def test_a_stream_that_shows_all_it_gets_is_left_as_it_is() -> None:
    escaping = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
    for stream in (io.StringIO(), escaping, None):
        show_nearest(stream)
    assert escaping.errors == "surrogateescape"
    text = io.StringIO()
    assert Shown(text).write(ODD) == len(ODD)
    assert text.getvalue() == ODD
