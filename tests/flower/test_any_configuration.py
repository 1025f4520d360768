"""Any combination of settings is either refused in one sentence or runs.

The same few examples in every test run; ``FEDSIM_EXAMPLES=5000 pytest ...`` tries as many new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import cli
from fedsim.captures.gradients import Gradients
from fedsim.core.config import ClientSettings, RunConfig, parse_text
from fedsim.core.determinism import use_deterministic
from fedsim.core.errors import ConfigError, FedsimError, InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.run_config import config_from_run_config
from fedsim.flower.server_app import check_output, execute
from fedsim.flower.simulation import machine_gpus, size_pool
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from strategies.registry import STRATEGIES
from tests.local_grid import LocalGrid
from tests.observers import Memory

ASKED = os.environ.get("FEDSIM_EXAMPLES")
EXAMPLES = int(ASKED or 60)
repeatable = settings(max_examples=EXAMPLES, derandomize=ASKED is None, deadline=None)

KEYS = [name.replace("_", "-") for name in RunConfig.model_fields]
MOST_STEPS = 60
"""Of a run that a test waits for; a longer one is planned only."""

Values = dict[str, Any]


def listed(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One value for all clients, or a list that they draw from."""
    return values | st.lists(values, min_size=1, max_size=3)


def captures() -> st.SearchStrategy[str]:
    counted = st.tuples(
        st.sampled_from(["first", "last", "every", "sketch"]), st.integers(1, 9)
    ).map(lambda drawn: f"{drawn[0]}:{drawn[1]}")
    whole = st.sampled_from(["none", "all", "first", "every:100", "sketch:4096", f"first:{10**30}"])
    return counted | whole


# resnet18 is drawn seldom: a state of it is 45 MB.
MODELS = ["cnn"] * 18 + ["resnet18", "resnet18-cifar"]
LAYERS = ["*", "0.*", "*.weight", "*.bias", "?.weight", "[01].*", "conv1.*", "fc.*", "layer4*"]

sizes = st.integers(2, 40)
epochs = st.integers(1, 2)
steps = st.integers(1, 4)
rates = st.sampled_from([0.01, 0.1, 1, 1e-12, 1e-320, 1e20, 1e38, 1e300])

tables = st.dictionaries(
    st.integers(0, 4).map(str),
    st.fixed_dictionaries(
        {},
        optional={
            "batch-size": sizes,
            "local-epochs": epochs,
            "local-steps": steps,
            "learning-rate": rates,
        },
    ),
    max_size=2,
)

# Values that most runs can use; what they cannot be combined with is left to chance.
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "dataset": st.sampled_from(["synthetic:60:3"] * 8 + ["synthetic:10:2", "synthetic:61:12"]),
    "task": st.just("vision"),
    "learning-rate-schedule": st.just("constant"),
    "client-evaluation": st.sampled_from(["none", "none", "metrics"]),
    "behavior": st.sampled_from([{}, {"honest": {"clients": [0]}}]),
    "data-root": st.sampled_from(["", "nowhere", "."]),
    "clients": st.integers(1, 6),
    "clients-per-round": st.integers(1, 3),
    "rounds": st.integers(1, 2),
    "partition": st.sampled_from(["dirichlet", "iid", "shards", "shards:1", "shards:5"]),
    "alpha": st.sampled_from([0.5, 5, 1e-300, 1e-4, 1e-2, 1e6, 1e17, 1e300, 1.7e308]),
    "min-samples": st.integers(1, 10),
    "seed": st.sampled_from([0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1]),
    "participants": st.lists(
        st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), min_size=2, max_size=3
    ),
    "model": st.sampled_from(MODELS),
    "norm": st.sampled_from(["batch", "group"]),
    "optimizer": st.sampled_from(["sgd", "adam"]),
    "learning-rate": listed(rates),
    "momentum": st.sampled_from([0, 0.0, 0.5, 0.9, 1 - 2**-53, 1e-320]),
    "nesterov": st.booleans(),
    "weight-decay": st.sampled_from([0, 5e-4, 1, 1e20, 1e39, 1e300, 1e-320]),
    "batch-size": listed(sizes),
    "local-epochs": listed(epochs),
    "local-steps": listed(steps),
    "client": tables,
    "capture": captures(),
    "capture-layers": st.lists(st.sampled_from(LAYERS), min_size=1, max_size=2)
    | st.sampled_from(LAYERS),
    "capture-dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "capture-encoding": st.sampled_from(["support", "dense"]),
    "capture-budget": st.sampled_from(["20 GB", "1 MB", "300kB", 10**6, "1.5 GiB"]),
    "gradient-statistics": st.booleans(),
    "strategy": st.sampled_from([*STRATEGIES]),
    "workers": st.integers(1, 6),
    "client-cpus": st.integers(1, 2),
    "client-gpus": st.sampled_from([0, 0.0]),
    "autocast": st.sampled_from(["none", "bfloat16", "float16"]),
    "compile": st.just(False),
    "device": st.sampled_from(["auto", "cpu"]),
    "deterministic": st.booleans(),
    "evaluate-every": st.sampled_from([1, 2, 3, 10**9]),
    "max-failures": st.sampled_from([0, 1, 10**30]),
    "client-timeout": st.sampled_from([600, 1e300]),
    "node-timeout": st.sampled_from([600, 1e300]),
    "allow-divergence": st.booleans(),
    "output": st.sampled_from(["run", "a/b/run", "r\u00fcn", "with\nlines", ""]),
    "ray-address": st.sampled_from(["local", "auto", "10.0.0.1:6379", "[::1]:6379"]),
    "mirror": st.sampled_from(["", "c\u00f6py"]),
}

NUMBERS = [-1, 0, 1, 2, 7, 61, 2**31, 2**32, 2**63, 10**30, 10**400, -(10**400)]
NUMBERS += [0.5, -0.0, 1.0, 1.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", " ", "cnn", "all", "5", "0", "auto", "\0", "\n", "\u0663", "x" * 5000, "\x1b[31m"]
OTHERS = [None, True, False, [], {}, [[]], [{}], [None], {"": 1}, {"1": {}}, {"1": {"x": 1}}]

# Values that only one key might take for something.
ODD: dict[str, list[Any]] = {
    "dataset": [
        "digits",
        "synthetic",
        "synthetic:",
        "synthetic::3",
        "synthetic:60:",
        "synthetic:060:03",
        "synthetic:60:3:1",
        "synthetic:10:3",
        "synthetic:60:1",
        "synthetic:-60:3",
        "synthetic:\uff16\uff10:3",
        "synthetic:\u00b2\u00b2",
        f"synthetic:{10**12}:3",
        f"synthetic:{10**400}:3",
        "synthetic:" + "9" * 5000,
        "synthetic:2000000000:400000000",
    ],
    "clients": [60, 61, 10**6],
    "partition": ["shards:", "shards:0", "shards:60", "shards:\uff12", "shards:" + "9" * 5000],
    "participants": [[[0, 0]], [[-1]], [[10**30]], [[0], []], [0], [[0], ["0"]], [[True], [0.0]]],
    "learning-rate": [[], [0.1, -1], [0.1, "x"], [[0.1]]],
    "batch-size": [[], [8, 0], [8, 2.5], [1], [10**30], 10**18],
    "local-epochs": [[], [1, 0], [10**30], 10**18],
    "local-steps": [[], [1, 0], [10**30], 10**18],
    "client": [
        {"a": {}},
        {"01": {}},
        {"-1": {}},
        {"99": {}},
        {"0": 3},
        {"0": {"batch-size": 1}},
        {"0": {"batch-size": 0}},
        {"0": {"batch-size": [2]}},
        {"0": {"local-steps": 10**30}},
        {"0": {"momentum": 0.5}},
        {"\u0663": {}},
        {"9" * 5000: {}},
    ],
    "capture": [
        *("first:", "first:0", "first:-1", "all:3", "FIRST:1", "every:\u0663"),
        *("sketch:0", "sketch:1048577", "sketch:1048576", "last:" + "9" * 5000),
    ],
    "capture-layers": ["[", "[]", "[!]", "[z-a]", "[[:a:]*", "\\", "**", "*,*", ["*", 3], [""]],
    "capture-budget": ["0", "1", "-1 GB", "1e3 GB", "1 PB", "9" * 16, "0.0000001 B", "\u0663 GB"],
    "workers": [1024, 1025],
    "client-gpus": [1, 0.5, 1.5, 2, 1e-300],
    "device": ["cuda", "mps", "cuda:0"],
    "compile": [1],
    "rounds": [100_000, 100_001],
    "ray-address": ["ray://a:1", "a:0", "a:65536", ":1", "a:\u0663", "a" * 5000 + ":1", "[:1"],
    "mirror": ["nowhere://a", "file/copy", "a?b", "s3://a:b@c/d", "x" * 300, "a\0b", "\udcff"],
    "output": [".", "..", "file", "file/run", "x" * 300, "a\0b", "/proc/nowhere", "\udcff"],
}


def odd_values(key: str) -> st.SearchStrategy[Any]:
    named = st.sampled_from([*ODD.get(key, []), *NUMBERS, *TEXTS, *OTHERS])
    if key in ("output", "mirror"):
        # Free text could name a folder outside of the test's.
        return named
    return st.one_of(
        named,
        named,
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.lists(st.integers(-2, 5) | st.text(max_size=3), max_size=3),
    )


def odd_settings() -> st.SearchStrategy[Values]:
    one = st.sampled_from(KEYS).flatmap(lambda key: odd_values(key).map(lambda v: {key: v}))
    misspelt = st.sampled_from(["lr", "clients ", "batch_size", "", "a\nb", "x" * 5000, "\x1b[31m"])
    unknown = misspelt.map(lambda key: {key: 1})
    return st.one_of(st.just({}), one, one, st.builds(lambda a, b: a | b, one, one), unknown)


@st.composite
def mappings(draw: st.DrawFn) -> Values:
    always = ("dataset", "clients", "clients-per-round", "rounds", "model", "min-samples")
    values: Values = draw(
        st.fixed_dictionaries(
            {key: SENSIBLE[key] for key in always},
            optional={key: strategy for key, strategy in SENSIBLE.items() if key not in always},
        )
    )
    return values | draw(odd_settings())


def assert_one_sentence(error: InputError, values: Values) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert text.isprintable(), ascii(text)
    assert len(text) < 1000, text
    field, separator, _ = text.partition(" = ")
    assert separator, text
    known = field.split(".")[0].removesuffix(" of round 1").removesuffix(" of round 2")
    known = known.removesuffix(" of round 3")
    unknown = [key for key in values if key not in KEYS]
    assert known in KEYS or unknown, text
    if isinstance(error, ConfigError):
        assert " cannot be used; expected " in text
        assert "Input should" not in text
        assert "expected at most 0" not in text


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Work in a folder with one file in it."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path("file").touch()
        yield Path(name)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def planned(values: Values) -> tuple[RunPlan, Path]:
    """Do what `fedsim run` does before it writes."""
    config = RunConfig.from_mapping(values)
    size_pool(config, cpus=2, machine_gpus=machine_gpus(config))
    plan = RunPlan.prepare(config)
    output = Path(config.output or "default")
    check_output(output, plan)
    return plan, output


def steps_of_run(plan: RunPlan) -> int:
    rounds = range(1, min(plan.config.rounds, MOST_STEPS) + 1)
    return sum(plan.steps_of(p) for r in rounds for p in plan.config.participants_of(r))


def assert_runs(plan: RunPlan, output: Path) -> None:
    config = plan.config
    grid = LocalGrid(app, config.clients, recordings=output.parent)
    observer, stop = Memory(), threading.Event()
    failure: FedsimError | None = None
    try:
        execute(grid, plan, output, observer=observer, workers=2, stop=stop)
    except RunFailedError as error:
        failure = error
    finally:
        # A worker's process ends with its run; this one goes on.
        use_deterministic(False)
    if failure is not None:
        # The only way to fail here: settings that no model survives.
        assert not config.allow_divergence
        causes = ("diverged: ", "not finite", "no client of round")
        assert any(cause in str(failure) for cause in causes), failure
        assert len(str(failure).splitlines()) == 1
    findings = verify(output, recompute=1)
    assert findings.violations == []
    if failure is not None and not (output / "rounds.jsonl").read_bytes():
        return
    run = load_run(output)
    assert run.status == ("failed" if failure else "finished")
    assert run.config == config
    last = run.round_rows[-1]["round"]
    assert failure or last == config.rounds
    assert list(run.rounds()["round"]) == list(range(last + 1))
    telemetry = run.telemetry()
    for number in range(1, last + 1):
        clients = run.round(number).clients
        assert sorted([*clients, *run.round(number).row["failed"]]) == sorted(
            config.participants_of(number)
        )
        assert set(telemetry[telemetry["round"] == number]["partition"]) >= set(clients)
        for partition, client in clients.items():
            kept = config.policy.kept_steps(plan.steps_of(partition))
            assert client.telemetry["num_steps_captured"] == len(kept)
            if kept and isinstance(config.policy, Gradients):
                names = config.policy.layers_of(plan.parameters)
                assert list(client.gradient(kept[-1])) == names


@repeatable
@given(mappings())
def test_any_configuration_runs_or_is_refused_in_one_sentence(values: Values) -> None:
    with empty_folder() as folder:
        try:
            plan, output = planned(values)
        except InputError as error:
            assert_one_sentence(error, values)
            assert entries(folder) == ["file"]
            return
        assert RunConfig.from_json(plan.config.to_json()) == plan.config
        if steps_of_run(plan) <= MOST_STEPS:
            assert_runs(plan, output)


# What a TOML value is made of, so that lists, tables, dates and numbers come up.
PIECES = ["[", "]", "{", "}", "=", ",", ".", "-", "+", "_", "e", "0", "1", "9", "5", "0x", "inf"]
PIECES += ["nan", "true", '"', "'", "'''", "\\", "\\u", "#", " ", "\n", "\r", "\t", "1979-05-27"]
PIECES += ["07:32:00", "3 = {batch-size = 8}", "*", ":", "9" * 5000, "[" * 3000, "\udcff", "\0"]
values_as_text = st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@repeatable
@given(st.sampled_from(KEYS), values_as_text)
def test_any_text_of_a_flag_is_a_value_or_refused_in_one_sentence(key: str, text: str) -> None:
    try:
        RunConfig.from_mapping({key: parse_text(key, text)})
    except ConfigError as error:
        assert_one_sentence(error, {})


@repeatable
@given(st.dictionaries(st.sampled_from(KEYS), values_as_text | st.integers() | st.floats()))
def test_any_run_config_of_flower_is_one_or_refused_in_one_sentence(values: Values) -> None:
    try:
        config_from_run_config(values)
    except ConfigError as error:
        assert_one_sentence(error, values)


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)} = {as_toml(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return repr(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    return json.dumps(value)


def as_document(values: Values) -> str:
    return "".join(f"{json.dumps(key)} = {as_toml(value)}\n" for key, value in values.items())


def documents() -> st.SearchStrategy[bytes]:
    """Files with settings, some with more lines that are no settings."""
    lines = mappings().map(as_document)
    junk = st.sampled_from([*[""] * 4, "[client.1]\n", "[clients.1]\n", "[[client]]\n", "\ufeff"])
    whole = st.builds(lambda text, more: text + more, lines, junk | values_as_text)
    return whole.map(lambda text: text.encode("utf-8", "surrogateescape"))


@repeatable
@given(documents())
def test_any_file_is_planned_or_refused_in_one_sentence(document: bytes) -> None:
    out, err = io.StringIO(), io.StringIO()
    with empty_folder() as folder:
        Path("run.toml").write_bytes(document)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(["plan", "run.toml"])
        assert entries(folder) == ["file", "run.toml"]
    if code == 0:
        assert err.getvalue() == ""
        assert "fits: " in out.getvalue()
    else:
        assert code == 2
        assert err.getvalue().startswith("fedsim: ")
        assert err.getvalue().count("\n") == 1


def test_every_key_is_drawn() -> None:
    drawn = {"batch-size", "local-epochs", "local-steps", "learning-rate"}
    assert {name.replace("_", "-") for name in ClientSettings.model_fields} == drawn
    assert {*SENSIBLE} == {*KEYS}
