"""A learning-rate schedule in a file of its own: `python examples/extend/schedule.py`.

It warms up over the first steps of a client's round, and halves the rate after every two rounds.
On the command line: `fedsim run --learning-rate-schedule examples/extend/schedule.py:stairs`.
"""

import fedsim
from fedsim.core.schedule import RateContext, Schedule

WARM_UP = 3


def stairs(about: RateContext) -> Schedule:
    """Give the rate of every step."""

    def rate(round_number: int, step: int) -> float:
        halved = about.learning_rate / 2 ** ((round_number - 1) // 2)
        return halved * min(1.0, (step + 1) / WARM_UP)

    return rate


CONFIG = {
    "dataset": "digits",
    "model": "cnn",
    "rounds": 3,
    "capture": "all",
    "learning-rate-schedule": f"{__file__}:stairs",
}

if __name__ == "__main__":
    run = fedsim.simulate(CONFIG)
    for number in range(1, 4):
        client = next(iter(run.round(number).clients.values()))
        print(number, [step["learning_rate"] for step in client.steps])
