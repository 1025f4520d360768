from __future__ import annotations

from tests.recording.conftest import cache, one_thread, plan

__all__ = ["cache", "one_thread", "plan"]
