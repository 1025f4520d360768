"""Which plugins this tree has: tests of what one provides are skipped where it was removed."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(p.parent.name for p in (ROOT / "fedsim/plugins").glob("*/__init__.py"))


def needs(*plugins: str) -> pytest.MarkDecorator:
    """Skip a test where one of the plugins is not there."""
    missing = sorted({*plugins} - {*PLUGINS})
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
