"""What Flower and Ray do, for which they are patched: each fails where a patch can go."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from ray._private import worker as ray_worker

from fedsim.flower.patches import server_identity, silent_workers


def made() -> Message:
    return Message(RecordDict(), 7, "query")


def test_flower_makes_no_message_where_none_of_its_launchers_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="is not set"):
        made()
    with server_identity():
        assert made().metadata.src_node_id == 1
    with pytest.raises(RuntimeError, match="is not set"):
        made()


class Errors:
    """What Ray's workers have to say: one thing."""

    def __init__(self, stopped: threading.Event, words: str) -> None:
        self._stopped = stopped
        self._words = words

    def subscribe(self) -> None:
        pass

    def poll(self) -> tuple[None, dict[str, object]]:
        self._stopped.set()
        return None, {"error_message": self._words, "job_id": b"job", "type": ""}

    def close(self) -> None:
        pass


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    stopped = threading.Event()
    worker = SimpleNamespace(
        gcs_error_subscriber=Errors(stopped, words),
        current_job_id=SimpleNamespace(binary=lambda: b"job"),
    )
    ray_worker.listen_error_messages(worker, stopped)
    return capsys.readouterr().out


def test_ray_announces_what_goes_wrong_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    before = ray_worker.print_to_stdstream
    assert "a worker died" in printed("a worker died", capsys)
    with silent_workers():
        assert printed("another died", capsys) == ""
    assert ray_worker.print_to_stdstream is before


DRIVER = """
import os, signal, sys, threading, time
import ray
from fedsim.flower.patches import reclaim_sigterm

told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
settings = dict(num_cpus=1, include_dashboard=False, logging_level="ERROR")
# As a run does: where it is the main thread, Ray sets a handler of Python as well.
thread = threading.Thread(target=ray.init, args=["local"], kwargs=settings)
thread.start()
thread.join()
if sys.argv[1] == "patched":
    reclaim_sigterm()
os.kill(os.getpid(), signal.SIGTERM)
# Until an alarm aborts the process, three seconds later.
signal.sigtimedwait([signal.SIGUSR2], 6)
ray.shutdown()
print(told.is_set())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("plain", -signal.SIGABRT), ("patched", 0)])
def test_ray_aborts_a_driver_some_time_after_a_sigterm(how: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER, how], capture_output=True, text=True)
    assert done.returncode == code
    assert ("SIGTERM received" in done.stderr) == (how == "plain")
    assert done.stdout == ("" if code else "True\n")
