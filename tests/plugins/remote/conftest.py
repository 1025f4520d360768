from tests.recording.conftest import copied, plan, recorded

__all__ = ["copied", "plan", "recorded"]
