import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedsim import cli
from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.reader import load_run
from fedsim.terminal import TerminalObserver
from strategies.registry import STRATEGIES
from tests import fuzz
from tests.installed import needs
from tests.local_grid import LocalGrid

ROOT = Path(__file__).parents[1]

BAD = [
    (["--clients", "0"], "clients = 0"),
    (["--clients", "ten"], "clients = 'ten'"),
    (["--clients-per-round", "11"], "clients-per-round = 11"),
    (["--rounds", "0"], "rounds = 0"),
    (["--rounds", "1.5"], "rounds = 1.5"),
    (["--alpha", "0"], "alpha = 0"),
    (["--alpha", "nan"], "alpha = nan"),
    (["--learning-rate", "-0.1"], "learning-rate = -0.1"),
    (["--learning-rate", "inf"], "learning-rate = inf"),
    (["--momentum", "1"], "momentum = 1"),
    (["--weight-decay", "-1"], "weight-decay = -1"),
    (["--batch-size", "[16, 1]"], "batch-size = 1"),
    (["--batch-size", "[]"], "batch-size = []"),
    (["--local-steps", "0"], "local-steps = 0"),
    (["--min-samples", "200"], "min-samples = 200"),
    (["--partition", "random"], "partition = 'random'"),
    (["--partition", "shards:500"], "partition = 'shards:500'"),
    (["--dataset", "mnist"], "dataset = 'mnist'"),
    (["--dataset", "synthetic:3"], "dataset = 'synthetic:3'"),
    (["--dataset", "synthetic:99000000000"], "dataset = 'synthetic:99000000000'"),
    (["--model", "vgg"], "model = 'vgg'"),
    (["--norm", "layer"], "norm = 'layer'"),
    (["--optimizer", "lion"], "optimizer = 'lion'"),
    (["--nesterov", "--momentum", "0"], "nesterov = True"),
    (["--capture", "last"], "capture = 'last'"),
    (["--capture", "first:0"], "capture = 'first:0'"),
    (["--capture", "last:0"], "capture = 'last:0'"),
    (["--capture", "sketch"], "capture = 'sketch'"),
    (["--capture-layers", "head.*"], "capture-layers = ['head.*']"),
    (["--capture-dtype", "float64"], "capture-dtype = 'float64'"),
    (["--capture-encoding", "zip"], "capture-encoding = 'zip'"),
    (["--capture-budget", "much"], "capture-budget = 'much'"),
    (["--capture-budget", "20 kB"], "capture-budget = '20 kB'"),
    (["--gradient-statistics", "some"], "gradient-statistics = 'some'"),
    (["--autocast", "int8"], "autocast = 'int8'"),
    (["--strategy", "fedsgd"], "strategy = 'fedsgd'"),
    (["--seed", "-1"], "seed = -1"),
    (["--participants", "[[0, 1]]"], "participants = "),
    (["--participants", "[[0, 10]]", "--rounds", "1"], "participants of round 1 = [0, 10]"),
    (["--client", "{10 = {batch-size = 8}}"], "client.10 = "),
    (["--client", "{1 = {batch = 8}}"], "client.1.batch = 8"),
    (["--client-cpus", "4096"], "client-cpus = 4096"),
    (["--workers", "33"], "workers = 33"),
    (["--device", "tpu"], "device = 'tpu'"),
    (["--max-failures", "-1"], "max-failures = -1"),
    (["--evaluate-every", "0"], "evaluate-every = 0"),
    (["--round", "3"], "round = '3' cannot be used; expected a known key, perhaps rounds"),
    (["--learningrate=3"], "learningrate = '3' cannot be used; expected a known key"),
    (["quick.toml", "second.toml"], "'second.toml'"),
    (["--rounds", "1000000000"], "rounds = 1000000000"),
    (["--rounds"], "--rounds"),
    (["--output", "--verbose"], "--output"),
    (["no-such-file.toml"], "no-such-file.toml"),
]


def call(arguments, capsys):
    code = cli.run(arguments)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.mark.parametrize(("flags", "named"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_sentence_and_exit_2_and_writes_nothing(
    flags, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, out, err = call(["run", *flags], capsys)
    # What takes data or a machine to be found may come after the first line.
    assert code == 2
    assert re.fullmatch(r"(preparing  [\w:]+, the partition and the model\n)?", out)
    assert err.startswith("fedsim: ")
    assert err.count("\n") == 1
    assert named in err
    assert re.search("; expected |cannot be read|; see `fedsim run --help`$", err)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


@pytest.mark.parametrize("flags", [["--client-gpus", "0.5"], ["--device", "cuda"]])
def test_gpus_where_there_are_none_are_refused(flags, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = call(["run", *flags], capsys)
    assert code == 2
    assert "GPU" in err or "CUDA" in err


def test_an_existing_output_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "taken").mkdir()
    code, _, err = call(["run", "--output", str(tmp_path / "taken")], capsys)
    assert code == 2
    assert "never overwritten" in err
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = ", "cannot be parsed"),
        ("round = 3", "round = 3 cannot be used; expected a known key, perhaps rounds"),
        ("clients = 20\n[clients.3]\nbatch-size = 8", "[client.<partition>]"),
        ("[clients.3]\nbatch-size = 8", "[client.<partition>]"),
        ("[client.3]\nbatch-size = 'x'", "client.3.batch-size = 'x'"),
        ('rounds = "3"', "rounds = '3'"),
        ("clients = true", "clients = True"),
    ],
)
def test_a_bad_file_is_one_sentence_and_exit_2(text, said, capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, _, err = call(["run", str(file)], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_a_file_that_is_no_text_is_refused(capsys, tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "run.json").write_text("[1, 2]")
    for name, said in (("run.toml", "not UTF-8"), ("run.json", "is not a configuration")):
        code, _, err = call(["run", str(tmp_path / name)], capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_inspect_of_something_else_is_one_sentence_and_exit_2(capsys, tmp_path):
    code, _, err = call(["inspect", str(tmp_path)], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a run directory" in err


def test_help_lists_every_key_and_an_unknown_command_is_refused(capsys):
    from fedsim.core.config import RunConfig

    code, out, _ = call(["run", "--help"], capsys)
    assert code == 0
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')} " in out
    code, _, err = call(["walk"], capsys)
    assert code == 2
    assert "'walk'" in err
    assert call(["--version"], capsys)[:2] == (0, "fedsim 0.1.0\n")


def test_help_has_groups_choices_and_defaults_as_a_flag_takes_them(capsys):
    out = call(["run", "--help"], capsys)[1]
    headings = [line for line in out.splitlines() if line.endswith(":") and line[:1].isalpha()]
    assert headings == [
        *("Positional arguments:", "Options:", "Data and clients:"),
        *("Model and local training:", "Captured gradients:", "Aggregation:", "Machine:"),
        *("Course of the run:", "Output:"),
    ]
    # Lines are broken at hyphens, too.
    text = " ".join(out.split()).replace("- ", "-")
    for shown in (
        "--dataset {digits,cifar10,cifar100,synthetic[:SAMPLES[:CLASSES]]} images in classes",
        "--model {resnet18,resnet18-cifar,cnn} resnet18 is torchvision's, resnet18-cifar has",
        "--norm {batch,group} normalisation layers (default: batch)",
        "--optimizer {sgd,adam} local optimizer (default: sgd)",
        "--device {auto,cpu,cuda,mps} where training",
        "--nesterov [{true,false}] Nesterov momentum (default: false)",
        "kernel taps that never get a gradient: lossless) or dense (default: support)",
        "(default: *)",
        "(default: 0.0005)",
        "or a table [strategy] with its name and settings (default: delta-fedavg)",
    ):
        assert shown in text
    assert all(name in text.partition("Aggregation: --strategy")[2] for name in STRATEGIES)
    assert "name='" not in text
    # A run is gone on with as it was recorded, whatever the defaults are.
    resumed = " ".join(call(["resume", "--help"], capsys)[1].split()).replace("- ", "-")
    assert "--norm {batch,group} normalisation layers --task" in resumed


def test_the_command_line_starts_quickly_without_torch():
    heavy = {"torch", "numpy", "pydantic", "rich", "ray", "flwr", "fsspec", "cryptography"}
    script = (
        "import sys, fedsim.cli as c; c.run(['--help']); c.run(['--version']); "
        f"print(sorted({heavy} & {{*sys.modules}}))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert finished.stdout.splitlines()[-2:] == ["fedsim 0.1.0", "[]"]


@needs("compare")
@pytest.mark.parametrize("command", [["run"], ["resume", "runs/one"], ["compare"]])
def test_the_first_line_waits_for_nothing(command, tmp_path):
    """Whoever reads a pipe sees it before anything that takes seconds is loaded."""
    script = (
        "import os, sys, fedsim.cli as cli\n"
        "class Pipe:\n"
        "    text = ''\n"
        "    def write(self, text): self.text += text\n"
        "    def flush(self):\n"
        "        loaded = {'ray', 'flwr', 'torch', 'numpy', 'pydantic'} & {*sys.modules}\n"
        "        sys.stderr.write(f'{self.text!r} {loaded}')\n"
        "        sys.stderr.flush()\n"
        "        os._exit(0)\n"
        "sys.stdout = Pipe()\n"
        f"cli.run({command})\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert finished.stderr == "'loading    torch, Flower and Ray\\n' set()"
    assert list(tmp_path.iterdir()) == []


def test_run_simulation_takes_the_same_arguments():
    finished = subprocess.run(
        [sys.executable, "run_simulation.py", "--clients", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert finished.returncode == 2
    assert finished.stderr == (
        "fedsim: clients = 0 cannot be used; expected a value of at least 1\n"
    )


def test_a_run_can_be_started_from_its_run_json(tmp_path):
    from fedsim.core.config import RunConfig, read_config_file

    config = RunConfig.from_mapping(
        {"rounds": 3, "client": {"1": {"batch-size": 8}}, "output": "x"}
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config.to_mapping()}))
    again = RunConfig.from_mapping(read_config_file(file))
    assert again == config.model_copy(update={"output": None})


def plan_lines(capsys, *flags):
    assert cli.run(["plan", "--model", "cnn", "--clients", "4", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if "  " in line}


def test_plan_tells_the_bytes_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = plan_lines(capsys, "--capture", "all", "--rounds", "2", "--clients-per-round", "2")
    # 19,546 parameters of four bytes.
    assert lines["capture"].startswith("all, float32, support, 78.2 kB a step, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--capture-dtype", "bfloat16"],
            "first:1, bfloat16, support, 39.1 kB a step, 156",
        ),
        (
            ["--capture-encoding", "dense"],
            "first:1, float32, dense, 78.2 kB a step, 312.7",
        ),
        (["--capture", "sketch:100"], "sketch:100, 400 B a step, "),
        (["--capture-layers", "13.*"], "first:1 of 13.*, float32, support, 20.5 kB a step, "),
        (["--capture", "none"], "none"),
    ],
)
def test_plan_tells_what_is_kept(capsys, flags, told):
    lines = plan_lines(capsys, "--rounds", "2", "--clients-per-round", "2", *flags)
    assert lines["capture"].startswith(told)


@pytest.mark.parametrize("name", ["plan", "run"])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--model", "cnn", "--capture", "first:9", "--capture-budget", "1 MB"],
            "capture-budget = '1 MB' cannot be used; expected at least ",
        ),
        # About 9 TB.
        (["--model", "resnet18", "--rounds", "10000"], "and its disk has"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    capsys,
    tmp_path,
    monkeypatch,
    name,
    flags,
    sentence,
):
    monkeypatch.chdir(tmp_path)
    assert cli.run([name, *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- a standard output that takes nothing


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "run"
    fuzz.make_run(path, {"capture": "none"}, seed=1)
    return path


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk():
    return open("/dev/full", "w")  # noqa: PTH123


@pytest.mark.parametrize("output", [broken_pipe, full_disk])
def test_a_run_goes_on_without_its_reader(output, tmp_path, monkeypatch):
    values = {"dataset": "synthetic:60:3", "model": "cnn", "clients": 3, "clients-per-round": 2}
    plan = RunPlan.prepare(RunConfig.from_mapping({**values, "rounds": 2, "batch-size": 16}))
    with output() as dead:
        monkeypatch.setattr(sys, "stdout", dead)
        execute(
            LocalGrid(app, 3, recordings=tmp_path),
            plan,
            tmp_path / "run",
            observer=TerminalObserver(),
            workers=1,
            stop=threading.Event(),
        )
    assert load_run(tmp_path / "run").status == "finished"


FULL = "fedsim: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(("output", "code", "said"), [(broken_pipe, 0, ""), (full_disk, 1, FULL)])
def test_a_reader_who_is_gone_is_no_failure_and_a_full_disk_is(
    output, code, said, command, recorded, capsys, monkeypatch
):
    dead = output()
    monkeypatch.setattr(sys, "stdout", dead)
    assert cli.run([command, str(recorded)]) == code
    assert capsys.readouterr().err == said
    if output is broken_pipe:
        # Nothing is left that would raise when the process ends.
        dead.close()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("{fedsim} inspect {run} >&- 2>&-", 0, ""),
        ("{fedsim} inspect {run} | true", 0, ""),
        (
            "ulimit -f 0; {fedsim} --version >{run}/out",
            1,
            "fedsim: standard output cannot be written: File too large\n",
        ),
    ],
)
def test_a_process_without_a_standard_output_ends_as_it_should(command, code, said, recorded):
    fedsim = f"'{sys.executable}' -m fedsim"
    finished = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.format(fedsim=fedsim, run=recorded)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Unbuffered, argparse itself swallows the error.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (code, "", said)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command_in(environment, *arguments, cwd=None):
    finished = subprocess.run(
        [sys.executable, "-m", "fedsim", *arguments],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return finished.returncode, finished.stdout, finished.stderr


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, b"Zo\xeb ?"),
        ({"PYTHONIOENCODING": "ascii"}, b"Zoe ?"),
        # Arguments are ASCII there too.
        (ASCII, b"plain"),
    ],
)
def test_a_plan_is_shown_as_far_as_the_output_can(environment, name, tmp_path):
    flags = ["--model", "cnn", "--clients", "4", "--clients-per-round", "2", "--output"]
    flags.append("plain" if name == b"plain" else "Zoë 東")
    code, out, err = command_in(environment, "plan", *flags, cwd=tmp_path)
    assert (code, err) == (0, b"")
    assert b"     2      615  # @ + : -     + + :" in out
    assert b"free on the disk of " + name in out


@needs("report")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param(
            "run --model cnn --clients 2 --clients-per-round 2 --rounds 1 --output {run}é",
            b"Zoe??e",
            marks=pytest.mark.matrix,
        ),
        ("inspect {run}", b" Zoe??  "),
        ("verify {run}", b"proven"),
        ("report {run} --output {run}.html", b"written: Zoe??.html"),
    ],
)
def test_no_command_fails_for_what_it_cannot_show(command, said, recorded, tmp_path):
    (tmp_path / "Zoë東京").symlink_to(recorded)
    given = command.format(run="Zoë東京").split()
    code, out, err = command_in({"PYTHONIOENCODING": "ascii"}, *given, cwd=tmp_path)
    assert (code, err) == (0, b"")
    assert said in out
