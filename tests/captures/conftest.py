from __future__ import annotations

from tests.recording.conftest import plan

__all__ = ["plan"]
