from tests.recording.conftest import cache, copied, one_thread, plan, recorded

__all__ = ["cache", "copied", "one_thread", "plan", "recorded"]
