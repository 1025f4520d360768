from __future__ import annotations

import io
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from rich.console import Console

from fedsim.core.config import RunConfig
from fedsim.core.errors import RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.core.units import format_bytes
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.files import json_line
from fedsim.recording.findings import Findings
from fedsim.recording.reader import Run, load_run
from fedsim.recording.writer import RunWriter
from fedsim.tasks.vision.datasets import Dataset, parse_name
from fedsim.terminal import (
    TerminalObserver,
    format_seconds,
    make_console,
    partition_table,
    print_findings,
    print_run,
    print_summary,
    round_line,
)
from tests.local_grid import LocalGrid
from tests.recording.rows import client_row

WIDTH = 140
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PARAMETERS = {"conv.weight": (16, 3, 3, 3), "fc.weight": (10, 512), "fc.bias": (10,)}


def console_of(*, terminal: bool = False, width: int = WIDTH) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        highlight=False,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ={"TERM": "xterm-256color"},
    )


def told(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def lines_of(console: Console) -> list[str]:
    return [line.rstrip() for line in told(console).splitlines()]


def plan_of(name: str = "synthetic:500:5", **values: Any) -> RunPlan:
    """Make a plan of a dataset of which there are labels alone: 0, 1, 2, ... in turn."""
    keys = {key.replace("_", "-"): value for key, value in values.items()}
    config = RunConfig.from_mapping({"dataset": name, "model": "cnn", "clients": 4, **keys})
    spec = parse_name(name)
    nothing = torch.zeros(0, dtype=torch.uint8)
    # Two images, for a plan looks at the gradient of one step.
    two = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(spec.train_size) % spec.classes
    order = np.argsort(labels.numpy(), kind="stable")
    return RunPlan(
        config=config,
        dataset=Dataset(
            spec=spec,
            train_images=two,
            train_labels=labels,
            test_images=nothing,
            test_labels=nothing,
        ),
        partition=np.array_split(order, config.clients),
        parameters=PARAMETERS,
        initial_state={name: np.zeros(shape, np.float32) for name, shape in PARAMETERS.items()},
    )


def row_of(number: int, **values: Any) -> dict[str, Any]:
    return {
        "round": number,
        "participants": [2, 0] if number else [],
        "failed": [],
        "global_loss": 2.0,
        "global_accuracy": 0.125,
        "state_sha256": f"{number:x}" * 64,
        "seconds": {"clients": 1.0, "evaluate": 0.5, "total": 1.5},
        **values,
    }


# --- numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (78_184, "78.2 kB"),
        (44_900_000, "44.9 MB"),
        (17_500_000_000, "17.5 GB"),
        (175_000_000_000, "175.0 GB"),
        (1_000_000_000_000, "1.0 TB"),
        (2_500_000_000_000_000, "2500.0 TB"),
    ],
)
def test_bytes_are_written_in_decimal_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(999_960, "1.0 MB"), (999_999_999, "1.0 GB")])
def test_bytes_that_round_up_to_the_next_unit_take_it(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (1.26, "1.3 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (61.4, "1 min 01 s"),
        (125, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7265, "2 h 01 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_durations_are_written_in_two_units_at_most(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_duration_that_rounds_up_to_a_minute_is_one() -> None:
    assert format_seconds(59.96) == "1 min 00 s"


# --- the line of a round


@pytest.mark.parametrize(
    ("row", "rounds", "line"),
    [
        (row_of(0), 5, "round 0/5  loss 2.0000  accuracy 0.1250  1.5 s"),
        (
            row_of(3, global_loss=2.24014, global_accuracy=0.220056),
            5,
            "round 3/5  loss 2.2401  accuracy 0.2201  clients 2 0  1.5 s",
        ),
        (row_of(3), 100, "round   3/100  loss 2.0000  accuracy 0.1250  clients 2 0  1.5 s"),
        (
            row_of(2, failed=[0, 7], participants=[7, 0, 3]),
            2,
            "round 2/2  loss 2.0000  accuracy 0.1250  clients 7 0 3  failed 0 7  1.5 s",
        ),
        (
            row_of(2, global_loss=None, global_accuracy=None),
            2,
            "round 2/2  not evaluated  clients 2 0  1.5 s",
        ),
        (
            row_of(2, global_loss=None),
            2,
            "round 2/2  loss not finite  accuracy 0.1250  clients 2 0  1.5 s",
        ),
        (
            row_of(2, global_loss=float("nan")),
            2,
            "round 2/2  loss not finite  accuracy 0.1250  clients 2 0  1.5 s",
        ),
        (
            row_of(2, global_loss=float("inf"), global_accuracy=0.0),
            2,
            "round 2/2  loss not finite  accuracy 0.0000  clients 2 0  1.5 s",
        ),
    ],
)
def test_a_round_has_one_line(row: dict[str, Any], rounds: int, line: str) -> None:
    assert round_line(row, rounds) == line


# --- the summary


def test_the_summary_tells_what_will_be_run() -> None:
    console = console_of()
    plan = plan_of(clients_per_round=3, rounds=2, capture="all", batch_size=50, seed=7)
    print_summary(console, plan, 2, Path("runs/one"))
    # 5,562 parameters; 3 clients of 125 samples make 3 steps each; states, deltas, aggregates.
    written = 4 * 5562 * (1 + 2 * (3 * 3 + 3 + 2))
    assert plan.run_bytes == written == 645_192
    assert plan.round_bytes(1) == 4 * 5562 * (3 * 3 + 3 + 2) == 311_472
    assert plan.captured_bytes() == 4 * 5562 * 2 * 3 * 3 == 400_464
    assert lines_of(console)[:8] == [
        "data       synthetic:500:5: 500 + 100 samples, 5 classes",
        "partition  dirichlet, 125 to 125 samples a client",
        "model      cnn, batch norm, 5,562 parameters",
        "rounds     2 of 3 of 4 clients, seed 7, delta-fedavg",
        "capture    all, float32, support, 22.2 kB a step, 400.5 kB in all",
        "a round    writes 311.5 kB at most",
        "to write   645.2 kB into runs/one",
        "workers    2 with 1 CPU each",
    ]


def test_the_summary_names_listed_participants_and_chosen_layers() -> None:
    console = console_of()
    plan = plan_of(
        participants=[[0], [1, 2]],
        rounds=2,
        capture="first:1",
        capture_layers=["fc.*", "conv*"],
        client_cpus=4,
    )
    print_summary(console, plan, 1, Path("run"))
    lines = lines_of(console)
    assert "rounds     2 of listed clients of 4, seed 42, delta-fedavg" in lines
    kept = "float32, support, 22.2 kB a step, 66.7 kB in all"
    assert f"capture    first:1 of fc.*, conv*, {kept}" in lines
    # Round 2 has two clients; each leaves a step and a delta.
    assert "a round    writes 133.5 kB at most" in lines
    assert "workers    1 with 4 CPU each" in lines


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"capture": "last:2", "capture_dtype": "bfloat16", "capture_encoding": "dense"},
            "last:2, bfloat16, dense, 11.1 kB a step, 89.0 kB in all",
        ),
        # 4 clients with 4 steps each.
        ({"capture": "sketch:250"}, "sketch:250, 1.0 kB a step, 16.0 kB in all"),
        ({"capture": "none", "capture_dtype": "bfloat16"}, "none"),
    ],
)
def test_the_summary_says_in_which_form_gradients_are_kept(
    values: dict[str, Any], line: str
) -> None:
    console = console_of()
    print_summary(console, plan_of(rounds=1, **values), 1, Path("run"))
    lines = lines_of(console)
    assert f"capture    {line}" in lines
    # What a round writes is no news where there is one.
    assert not [found for found in lines if found.startswith("a round ")]


def test_a_run_that_captures_nothing_says_so() -> None:
    console = console_of()
    print_summary(console, plan_of(capture="none"), 1, Path("run"))
    assert "capture    none" in lines_of(console)


def test_a_run_that_goes_on_tells_the_bytes_still_to_come() -> None:
    plan = plan_of(rounds=3, capture="none")
    left = plan.round_bytes(3)
    assert plan.bytes_after(2) == left
    assert plan.bytes_after(-1) == plan.run_bytes == 3 * left + plan.state_bytes
    console = console_of()
    print_summary(console, replace(plan, done=2), 1, Path("run"))
    assert f"to write   {format_bytes(left)} more into run" in lines_of(console)


def test_the_name_of_a_dataset_is_printed_as_it_is() -> None:
    console = console_of()
    print_summary(console, plan_of("synthetic:100:10"), 1, Path("run"))
    assert "data       synthetic:100:10: 100 + 20 samples, 10 classes" in lines_of(console)


@pytest.mark.parametrize("path", ["runs/[a]", "runs/[/b]", "runs/:x:"])
def test_the_path_of_a_run_is_printed_as_it_is(path: str) -> None:
    console = console_of()
    print_summary(console, plan_of(), 1, Path(path))
    assert any(line.endswith(f" into {path}") for line in lines_of(console))


def test_globs_of_layers_are_printed_as_they_are() -> None:
    console = console_of()
    plan = plan_of(capture="all", capture_layers=["[cf]*.weight"])
    print_summary(console, plan, 1, Path("run"))
    line = "capture    all of [cf]*.weight, float32, support, 22.2 kB a step"
    assert any(found.startswith(line) for found in lines_of(console))


# --- what was verified


def test_what_was_left_out_is_no_failure() -> None:
    console, findings = console_of(), Findings()
    findings.prove("replay", 377)
    findings.leave("recomputed", "the data is not at hand")
    findings.violate("state", "rounds/0001/global.safetensors: fc.weight is another")
    findings.prove("aggregate")
    findings.violate("aggregate", "rounds/0002/aggregate.safetensors: fc.weight is another")
    print_findings(console, findings, 1.0)
    # The right edge of the column is where the heading ends.
    heading, *lines = lines_of(console)
    edge = heading.index("proven") + len("proven")
    found = {line[:14].strip(): line[14:edge].strip() for line in lines if line[:14].strip()}
    assert {name: found[name] for name in ("gradients", "replay", "recomputed", "state")} == {
        "gradients": "-",
        "replay": "377 steps",
        "recomputed": "not proven",
        "state": "1 wrong",
    }
    assert found["aggregate"] == "1 rounds, 1 wrong"


# --- the partition


def test_the_partition_has_a_shade_for_each_class_of_each_client() -> None:
    console = console_of()
    #                  0 0 0 0 0 0 0 0 1 | 0 0 0 0 2 2 | 2
    labels = np.array([0] * 8 + [1] + [0] * 4 + [2] * 2 + [2])
    partition = [np.arange(9), np.arange(9, 15), np.arange(15, 16)]
    console.print(partition_table(partition, labels, 3))
    # The most samples of a class at a client, 8, are a full block; one sample is never blank.
    assert lines_of(console) == [
        "client  samples  0 1 2  classes",
        "     0        9  █ ▁",
        "     1        6  ▄   ▂",
        "     2        1      ▁",
    ]


def test_a_class_is_named_above_its_shades() -> None:
    console = console_of()
    labels = np.array([0, 1, 2])
    console.print(partition_table([np.array([i]) for i in range(3)], labels, 3))
    title, *rows = told(console).splitlines()
    assert [row.index("█") for row in rows] == [title.index(str(c)) for c in range(3)]


def test_one_sample_among_thousands_is_not_blank() -> None:
    console = console_of()
    labels = np.array([0] * 10_000 + [1])
    console.print(partition_table([np.arange(10_001)], labels, 2))
    assert lines_of(console)[1] == "     0    10001  █ ▁"


@pytest.mark.parametrize("width", [80, WIDTH])
def test_a_hundred_classes_and_two_hundred_clients_are_shortened(width: int) -> None:
    console = console_of(width=width)
    labels = np.arange(20_000) % 100
    partition = np.array_split(np.arange(20_000), 200)
    console.print(partition_table(partition, labels, 100))
    lines = lines_of(console)
    assert len(lines) == 1 + 24 + 1
    assert lines[0] == "client  samples  classes 0 to 99"
    assert lines[1] == "     0      100  " + " ".join("█" * 20)
    assert lines[24] == "    23      100  " + " ".join("█" * 20)
    assert lines[25] == "   ...           and 176 more clients"
    assert max(len(line) for line in lines) <= width


@pytest.mark.parametrize(
    ("classes", "clients", "title", "columns", "rows"),
    [
        (20, 24, " ".join(f"{c:2}" for c in range(20)) + "  classes", 20, 24),
        (21, 25, "classes 0 to 20", 20, 25),
    ],
)
def test_shortening_begins_after_twenty_classes_and_after_twenty_four_clients(
    classes: int, clients: int, title: str, columns: int, rows: int
) -> None:
    console = console_of()
    size = classes * clients * 2
    partition = np.array_split(np.arange(size), clients)
    console.print(partition_table(partition, np.arange(size) % classes, classes))
    lines = lines_of(console)
    assert lines[0].endswith(title)
    assert len(lines) == 1 + rows
    assert len(lines[1].split()) == 2 + columns


def test_the_summary_of_a_large_run_stays_within_a_narrow_terminal() -> None:
    console = console_of(width=80, terminal=True)
    plan = plan_of(
        "synthetic:20000:100",
        clients=200,
        clients_per_round=150,
        capture="all",
        capture_layers=[f"layer{n}.*" for n in range(40)] + ["*"],
    )
    print_summary(console, plan, 8, Path("runs/large"))
    lines = [ESCAPES.sub("", line).rstrip() for line in told(console).splitlines()]
    assert max(len(line) for line in lines) <= 80
    assert any("and 176 more clients" in line for line in lines)


# --- watching a run


def watch(console: Console, **values: Any) -> TerminalObserver:
    observer = TerminalObserver(console)
    observer.run_started(plan_of(clients_per_round=2, rounds=2, **values), 2, Path("runs/one"))
    return observer


def play(observer: TerminalObserver) -> None:
    observer.round_finished(row_of(0, global_accuracy=0.1))
    for number in (1, 2):
        observer.round_started(number, [2, 0])
        for partition in (0, 2):
            observer.client_finished(
                {"round": number, "partition": partition, "bytes_captured": 1_500_000}
            )
        observer.round_finished(row_of(number, global_accuracy=0.75 / number))
    observer.run_finished(Path("runs/one"))


@pytest.mark.parametrize("more", [0, 1])
def test_a_run_that_was_gone_on_with_tells_of_all_its_rounds(more: int, tmp_path: Path) -> None:
    accuracies = [0.1, 0.75, 0.5]
    rows = [json_line(row_of(n, global_accuracy=a)) for n, a in enumerate(accuracies)]
    (tmp_path / "rounds.jsonl").write_bytes(b"".join(rows))
    console = console_of()
    observer = TerminalObserver(console)
    observer.run_started(plan_of(clients_per_round=2, rounds=2 + more), 2, tmp_path)
    for number in range(3, 3 + more):
        observer.round_started(number, [2, 0])
        observer.round_finished(row_of(number, global_accuracy=0.625))
    observer.run_finished(tmp_path)
    lines = lines_of(console)
    assert "waiting    for the workers" in lines
    last = next(i for i, line in enumerate(lines) if line.endswith(" at the end"))
    assert lines[last : last + 2] == [
        f"accuracy  {0.625 if more else 0.5:.4f} at the end",
        "          0.7500 at best, in round 1",
    ]
    assert "time      0.0 s" in lines or more


def test_a_file_gets_plain_lines_and_the_closing_table() -> None:
    console = console_of()
    play(watch(console))
    text = told(console)
    assert "\x1b" not in text
    lines = lines_of(console)
    # Round 0 comes once the engine is there, which takes seconds.
    started = lines.index("waiting    for the workers, then evaluating the untrained model")
    assert lines[started + 1] == "round 0/2  loss 2.0000  accuracy 0.1000  1.5 s"
    rounds = lines[lines.index("round 0/2  loss 2.0000  accuracy 0.1000  1.5 s") :]
    assert rounds[:3] == [
        "round 0/2  loss 2.0000  accuracy 0.1000  1.5 s",
        "round 1/2  loss 2.0000  accuracy 0.7500  clients 2 0  1.5 s",
        "round 2/2  loss 2.0000  accuracy 0.3750  clients 2 0  1.5 s",
    ]
    assert rounds[3:8] == [
        "",
        "accuracy  0.3750 at the end",
        "          0.7500 at best, in round 1",
        "loss      2.0000 at the end",
        "clients   4 trained in 2 rounds",
    ]
    assert rounds[8] == "captured  6.0 MB of gradients"
    assert re.fullmatch(r"time      \d\.\d s", rounds[9])
    assert rounds[10:] == ["state     sha256 2222222222222222", "run       runs/one"]


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end() -> None:
    console = console_of(terminal=True)
    observer = watch(console)
    assert "starting workers" in told(console)
    assert "0/4 clients" in told(console)
    observer.round_started(1, [2, 0])
    observer.client_finished({"round": 1, "partition": 2, "bytes_captured": 2_500})
    observer.round_finished(row_of(1))
    observer.close()
    text = ESCAPES.sub("", told(console))
    assert "round 1/2  loss 2.0000  accuracy 0.1250  clients 2 0  1.5 s" in text
    # The bar is drawn a last time when it is closed.
    assert re.search(r"round 1/2 \S+ 1/4 clients \d:\d\d:\d\d \d.* left, 2\.5 kB captured", text)
    # Then the cursor is shown again and the line of the bar erased.
    assert told(console).endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
    before = told(console)
    observer.close()
    assert told(console) == before


def test_the_end_closes_the_bar_before_the_table() -> None:
    console = console_of(terminal=True)
    play(watch(console))
    last = told(console)[told(console).rindex("\x1b[?25h") :]
    assert "0.7500 at best, in round 1" in last
    assert "clients   4 trained in 2 rounds" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_a_loss_that_is_not_finite_is_called_so(terminal: bool) -> None:
    console = console_of(terminal=terminal)
    observer = watch(console)
    observer.round_started(1, [2, 0])
    observer.round_finished(row_of(1, global_loss=float("nan"), global_accuracy=0.01))
    observer.round_finished(row_of(2, global_loss=None, global_accuracy=0.01))
    observer.run_finished(Path("run"))
    text = ESCAPES.sub("", told(console))
    assert "round 1/2  loss not finite  accuracy 0.0100" in text
    assert "round 2/2  loss not finite  accuracy 0.0100" in text
    assert "loss      not finite at the end" in text
    assert "accuracy  0.0100 at the end" in text
    assert "nan" not in text


def test_rounds_that_were_not_evaluated_have_no_part_in_the_closing_table() -> None:
    console = console_of()
    observer = watch(console)
    observer.round_started(1, [2, 0])
    observer.round_finished(row_of(1, global_loss=None, global_accuracy=None))
    observer.round_finished(row_of(2, global_loss=1.25, global_accuracy=0.5))
    observer.run_finished(Path("run"))
    lines = lines_of(console)
    assert "round 1/2  not evaluated  clients 2 0  1.5 s" in lines
    assert "accuracy  0.5000 at the end" in lines
    assert "          0.5000 at best, in round 2" in lines
    assert "loss      1.2500 at the end" in lines


def test_the_lines_of_many_participants_stay_within_the_width() -> None:
    console = console_of(width=80)
    observer = watch(console)
    observer.round_finished(row_of(1, participants=list(range(200))))
    assert max(len(line) for line in lines_of(console)) <= 80
    assert " ".join(lines_of(console)).endswith("10 11 and 188 more  1.5 s")


def a_traceback() -> str:
    def of_the_client() -> None:
        raise ValueError("labels [/b] of :x: are [red]")

    try:
        of_the_client()
    except ValueError:
        return traceback.format_exc()
    raise AssertionError


@pytest.mark.parametrize("terminal", [False, True])
def test_a_client_that_fails_shows_its_partition_and_its_own_traceback(terminal: bool) -> None:
    console = console_of(terminal=terminal)
    observer = watch(console)
    observer.client_failed(1, 3, a_traceback().replace(":x:", "x"))
    observer.close()
    drawn = ESCAPES.sub("", told(console)).splitlines()
    lines = [line for line in drawn if "0/4 clients" not in line and "1/4 clients" not in line]
    start = lines.index("round 1: client 3 failed:")
    assert lines[start + 1] == "    Traceback (most recent call last):"
    assert any(re.fullmatch(r'      File ".*", line \d+, in of_the_client', x) for x in lines)
    assert "    ValueError: labels [/b] of x are [red]" in lines


def test_the_text_of_a_failure_is_printed_as_it_is() -> None:
    console = console_of()
    watch(console).client_failed(1, 3, a_traceback())
    assert "    ValueError: labels [/b] of :x: are [red]" in lines_of(console)


def test_clients_that_failed_are_not_counted_as_trained() -> None:
    console = console_of()
    observer = watch(console, max_failures=1)
    observer.round_started(1, [2, 0])
    observer.client_failed(1, 2, "why")
    observer.client_finished({"round": 1, "partition": 0, "bytes_captured": 0})
    observer.round_finished(row_of(1, failed=[2]))
    observer.round_finished(row_of(2, participants=[]))
    observer.run_finished(Path("run"))
    assert "clients   1 trained in 2 rounds, 1 failed" in lines_of(console)


@pytest.mark.parametrize("max_failures", [0, 1])
def test_a_failure_in_a_real_run_is_told_with_its_cause(max_failures: int, tmp_path: Path) -> None:
    def break_client(partition: int, message: Message) -> None:
        if partition == 1 and message.metadata.message_type == "train":
            raise ZeroDivisionError("in the client")

    values = {"dataset": "synthetic:60:2", "model": "cnn", "clients": 3, "clients-per-round": 3}
    config = RunConfig.from_mapping({**values, "rounds": 1, "max-failures": max_failures})
    console = console_of()
    observer = TerminalObserver(console)

    def run() -> None:
        execute(
            LocalGrid(app, 3, before=break_client, recordings=tmp_path),
            RunPlan.prepare(config),
            tmp_path / "run",
            observer=observer,
            workers=1,
            stop=threading.Event(),
        )

    if max_failures:
        run()
    else:
        with pytest.raises(RunFailedError, match="client 1 failed in round 1"):
            run()
    lines = lines_of(console)
    assert "round 1: client 1 failed:" in lines
    assert "    ZeroDivisionError: in the client" in lines
    rounds = [line for line in lines if line.startswith("round 1/1")]
    assert len(rounds) == max_failures
    assert all("  failed 1  " in line for line in rounds)


def test_what_is_not_a_terminal_has_room_for_the_tables() -> None:
    assert make_console().width == 140


# --- inspecting a run


def manifest_of(plan: RunPlan) -> dict[str, Any]:
    spec = plan.dataset.spec
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "config": plan.config.to_mapping(),
        "versions": {"python": "3.11.7", "torch": "2.12.1", "numpy": "2.4.0", "fedsim": "0.1.0"},
        "model": {
            "arch": plan.config.model,
            "parameters": [
                {"name": n, "shape": list(s), "dtype": "float32"}
                for n, s in plan.parameters.items()
            ],
            "buffers": [],
        },
        "dataset": {
            "name": spec.name,
            "classes": spec.classes,
            "train_size": spec.train_size,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "test_size": spec.test_size,
            "sha256": "0" * 64,
        },
        "partition": {"sha256": "0" * 64, "sizes": [9, 2_000, 31, 4]},
    }


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Write a run by hand and open it by a short relative path."""
    monkeypatch.chdir(tmp_path)

    def make(*rows: dict[str, Any], error: str | None = None, **values: Any) -> Run:
        plan = plan_of(rounds=3, capture="first:2", **values)
        writer = RunWriter.create(Path("run"), manifest_of(plan), plan.partition)
        for row in rows:
            for partition in row["participants"]:
                client = {"round": row["round"], "partition": partition}
                if partition in row["failed"]:
                    writer.add_failure({**client, "status": "failed", "error": "why"})
                else:
                    captured = {"bytes_captured": 2_250_000, "num_steps_captured": 2}
                    writer.add_client(client_row(row["round"], partition, **captured), {})
            writer.add_round(row)
        writer.finish("failed" if error else "finished", error)
        return load_run(Path("run"))

    return make


def test_a_run_is_described_line_by_line(make_run: Callable[..., Run]) -> None:
    console = console_of()
    run = make_run(
        row_of(0, global_loss=2.30259),
        row_of(1, participants=[3, 1, 2], failed=[1, 3]),
        row_of(2, global_loss=None, global_accuracy=None),
        row_of(3, global_loss=None, global_accuracy=0.0625),
    )
    print_run(console, run)
    assert lines_of(console) == [
        "run        run",
        "status     finished",
        "created    2026-01-02T03:04:05+00:00",
        "data       synthetic:500:5: 500 + 100 samples, 5 classes",
        "partition  dirichlet, 4 clients, 4 to 2000 samples",
        "model      cnn, batch norm, 5,562 parameters",
        "strategy   delta-fedavg, seed 42",
        "captured   first:2: 10 steps, 11.2 MB",
        "versions   python 3.11.7, torch 2.12.1, numpy 2.4.0, fedsim 0.1.0",
        "",
        "round        loss  accuracy  clients  failed  seconds  state sha256",
        "    0      2.3026    0.1250                       1.5  0000000000000000",
        "    1      2.0000    0.1250  3 1 2       1 3      1.5  1111111111111111",
        "    2                        2 0                  1.5  2222222222222222",
        "    3  not finite    0.0625  2 0                  1.5  3333333333333333",
    ]


def test_a_failed_run_says_why(make_run: Callable[..., Run]) -> None:
    console = console_of()
    print_run(console, make_run(row_of(0), error="client 3 failed in round 1: ValueError: no"))
    assert lines_of(console)[1] == ("status     failed: client 3 failed in round 1: ValueError: no")


def test_a_killed_run_is_told_from_one_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of(rounds=3, capture="first:2")
    writer = RunWriter.create(Path("run"), manifest_of(plan), plan.partition)
    console = console_of()
    print_run(console, load_run(Path("run")))
    assert lines_of(console)[1] == "status     running"
    writer.close()
    console = console_of()
    print_run(console, load_run(Path("run")))
    assert lines_of(console)[1] == "status     killed: `fedsim resume run` continues"


def test_the_error_of_a_failed_run_is_printed_as_it_is(make_run: Callable[..., Run]) -> None:
    console = console_of()
    print_run(console, make_run(row_of(0), error="ValueError: [/b] is no :x:"))
    assert lines_of(console)[1] == "status     failed: ValueError: [/b] is no :x:"


def test_a_run_without_a_finished_round_can_be_inspected(make_run: Callable[..., Run]) -> None:
    console = console_of()
    print_run(console, make_run(error="interrupted"))
    lines = lines_of(console)
    assert lines[1] == "status     failed: interrupted"
    assert lines[7] == "captured   first:2: 0 steps, 0 B"
    assert lines[10:] == ["round  loss  accuracy  clients  failed  seconds  state sha256"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_of_many_participants_stays_within_the_width(
    terminal: bool, make_run: Callable[..., Run]
) -> None:
    console = console_of(terminal=terminal)
    print_run(console, make_run(row_of(0), row_of(1, participants=list(range(200)))))
    lines = [line.rstrip() for line in ESCAPES.sub("", told(console)).splitlines()]
    assert max(len(line) for line in lines) <= WIDTH
    assert sum("1111111111111111" in line for line in lines) == 1
