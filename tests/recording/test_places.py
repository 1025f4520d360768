from __future__ import annotations

import re

from fedsim.compare import default_output as comparison
from fedsim.flower.server_app import default_output as run


def test_names_that_nobody_chose_are_never_the_same() -> None:
    for name, start in ((run, "runs/"), (comparison, "runs/compare-")):
        names = [str(name()) for _ in range(100)]
        # All within a second or two.
        assert len(set(names)) == 100
        assert all(re.fullmatch(start + r"\d{8}-\d{6}-[0-9a-f]{8}", name) for name in names)
