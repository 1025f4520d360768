import subprocess
import sys

PROGRAM = """
import os, signal, threading
from fedsim import cli
from fedsim.interrupts import stop_on_signals

def run(arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    stop, after_round = threading.Event(), threading.Event()
    stop_on_signals(stop, after_round, str)
    return 7 if after_round.is_set() and not stop.is_set() else 8

cli.run = run
cli.main([])
"""


def test_a_warning_of_the_batch_system_while_a_command_loads_is_remembered():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    said = "fedsim: stopping after this round, as SIGUSR1 asks; an interrupt ends it now\n"
    assert (done.returncode, done.stderr) == (7, said)
