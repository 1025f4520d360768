from __future__ import annotations

import re

from fedsim.recording.places import dated_name


def test_names_that_nobody_chose_are_never_the_same() -> None:
    names = [dated_name() for _ in range(100)]
    # All within a second or two.
    assert len(set(names)) == 100
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", name) for name in names)
