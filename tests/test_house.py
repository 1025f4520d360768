"""The direction of imports, and what no module may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedsim.core.plugins import GROUP
from tests.installed import PLUGINS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# From the bottom; a module knows its own room and those below.
ROOMS = [
    ["fedsim.core"],
    ["fedsim.tasks", "fedsim.behaviors", "fedsim.schedules", "fedsim.evaluations"],
    ["fedsim.recording"],
    ["fedsim.captures"],
    ["fedsim.flower.messages"],
    ["strategies"],
    ["fedsim.flower"],
    [
        *("fedsim.api", "fedsim.apart", "fedsim.app", "fedsim.cell", "fedsim.cli"),
        *("fedsim.command", "fedsim.interrupts", "fedsim.terminal", "fedsim.trackers"),
        "fedsim.tracking",
        *("fedsim.__main__", "run_simulation"),
    ],
    ["fedsim.plugins"],
]
FILES = [
    *sorted((ROOT / "fedsim").rglob("*.py")),
    *sorted((ROOT / "strategies").rglob("*.py")),
    ROOT / "run_simulation.py",
]
OURS = ("fedsim", "strategies", "run_simulation")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of(module):
    for level, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    return None


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


VISION = "fedsim.tasks.vision.task"
# Arithmetic of layers, not of losses.
KERNELS = {"torch.nn.functional.linear", "torch.nn.functional.pad"}


def source_of(module):
    return MODULES[module].read_text(encoding="utf-8")


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(module, tree):
    """List every module that a tree imports, at its top or inside functions."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base == "fedsim" and alias.name in ("Run", "load_run", "simulate"):
                    yield "fedsim.api"
                else:
                    yield inner if base.split(".")[0] in OURS and is_module(inner) else base


def test_every_module_is_in_a_room():
    assert [m for m in MODULES if room_of(m) is None] == ["fedsim"]
    assert {room_of(m) for m in MODULES} - {None} == set(range(len(ROOMS)))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"fedsim"}))
def test_a_module_knows_only_its_own_room_and_those_below(module):
    imported = set(imported_by(module, parse(MODULES[module])))
    ours = {name for name in imported if name.split(".")[0] in OURS} - {"fedsim"}
    above = sorted(n for n in ours if room_of(n) is None or room_of(n) > room_of(module))
    assert above == []
    if room_of(module) <= room_of("fedsim.captures"):
        assert {n.split(".")[0] for n in imported}.isdisjoint({"flwr", "ray"})


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_knows_no_other_plugin_and_is_declared(plugin):
    room = f"fedsim.plugins.{plugin}"
    own = [m for m in MODULES if m == room or m.startswith(f"{room}.")]
    imported = {name for m in own for name in imported_by(m, parse(MODULES[m]))}
    theirs = {n for n in imported if n.startswith("fedsim.plugins") and not n.startswith(room)}
    assert theirs == set()
    assert PROJECT["entry-points"][GROUP][plugin] == room


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_task_is_known_in_its_own_room_alone(module):
    tree, inside = parse(MODULES[module]), module.startswith("fedsim.tasks")
    imported = {n for n in imported_by(module, tree) if n.startswith("fedsim.tasks")}
    assert inside or imported == set()
    # One loss and one batch maker: what else needs them asks the task.
    losses = {n for n in names_used(tree) if n.startswith("torch.nn.functional.")} - KERNELS
    losses |= {n for n in names_used(tree) if n.endswith("Loss")}
    assert losses == ({"torch.nn.functional.cross_entropy"} if module == VISION else set())
    made = {name for name in ("augment", "normalise") if f"def {name}(" in source_of(module)}
    assert made == ({"augment", "normalise"} if module == "fedsim.tasks.vision.images" else set())


# What packages are called, where that is not how they are imported.
DISTRIBUTIONS = {"PIL": "pillow", "mlflow": "mlflow-skinny", "sklearn": "scikit-learn"}
# flwr[simulation] brings it at the version that Flower takes.
OF_FLOWER = {"ray"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_a_module_imports_is_declared(module):
    needs = PROJECT["dependencies"]
    if module.startswith(("fedsim.plugins.", "fedsim.trackers.")):
        # Of a plugin or a tracker, in the extra of its name too.
        needs = needs + EXTRAS.get(module.split(".")[2], [])
    declared = {re.split(r"[\[<>=]", need)[0] for need in needs} | OF_FLOWER
    imported = {name.split(".")[0] for name in imported_by(module, parse(MODULES[module]))}
    theirs = imported - {*sys.stdlib_module_names, *OURS}
    named = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in theirs}
    assert sorted(named - declared) == []


def test_what_plugins_need_is_brought_together_and_to_developers():
    (every,) = EXTRAS["all"]
    brought = set(re.fullmatch(r"fedsim\[(.*)\]", every)[1].split(","))
    trackers = {m.split(".")[2] for m in MODULES if m.startswith("fedsim.trackers.")}
    assert brought == set(EXTRAS) - trackers - {"all", "dev"}
    assert EXTRAS["dev"][0].startswith("fedsim[all,")


def test_the_package_itself_imports_its_face_alone_and_only_when_asked():
    tree = parse(MODULES["fedsim"])
    names = set(imported_by("fedsim", tree)) - {"__future__", "typing"}
    assert names == {"fedsim.api"}
    at_the_top = {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in imported_by("fedsim", ast.Module([node], []))
    }
    assert at_the_top <= {"__future__", "typing"}


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.serialization", "pandas.read_pickle"}
# The one form that is a pickle, for readers that take nothing else: written, never read.
MAY_SAVE = {"fedsim.plugins.export.export"}
# The one room that lends the global generators out, and puts them back.
MAY_SEED = {"fedsim.core.rng"}
SEEDS = {f"numpy.random.{call}" for call in ("get_state", "seed", "set_state")} | {"random.seed"}
# Drawn from or changed, a global generator makes results depend on what ran before.
GLOBAL_DRAWS = {
    *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.random.seed"),
    *("torch.set_rng_state", "torch.random.set_rng_state", "torch.cuda.manual_seed"),
    *("torch.cuda.manual_seed_all", "torch.rand", "torch.randn", "torch.randint"),
    *("torch.randperm", "torch.rand_like", "torch.randn_like", "torch.normal"),
    *("torch.bernoulli", "torch.multinomial"),
}
LOCAL_GENERATORS = {"Generator", "PCG64", "SeedSequence", "RandomState", "BitGenerator"}
# Reading the state of `random`, and giving it back as it was, changes nothing.
KEPT_RANDOM = {"getstate", "setstate", "Random"}


def dotted(node, aliases):
    """Give the full name of an attribute, module aliases resolved."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *parts])


def names_used(tree):
    aliases = {}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                aliases[alias.asname or name] = name
                used.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.add(f"{node.module}.{alias.name}")
    used |= {dotted(n, aliases) for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.Name))}
    return used - {None}


def forbidden(name):
    top, _, rest = name.partition(".")
    if top in UNSAFE_MODULES or name in UNSAFE_CALLS | GLOBAL_DRAWS:
        return True
    if name.startswith("numpy.random."):
        return name.split(".")[2] not in LOCAL_GENERATORS
    return top == "random" and rest != "" and rest not in KEPT_RANDOM


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_unpickles_or_touches_a_global_generator(module):
    tree = parse(MODULES[module])
    allowed = {"torch.save"} if module in MAY_SAVE else set()
    allowed |= SEEDS if module in MAY_SEED else set()
    assert sorted(n for n in names_used(tree) - allowed if forbidden(n)) == []
    keywords = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert "allow_pickle" not in keywords


def test_torchs_global_generator_is_named_in_the_room_of_randomness_alone():
    users = [m for m in MODULES if "default_generator" in MODULES[m].read_text(encoding="utf-8")]
    assert users == ["fedsim.core.rng"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_texts_are_read_and_written_in_an_encoding_that_is_named(module):
    calls = (n for n in ast.walk(parse(MODULES[module])) if isinstance(n, ast.Call))
    unnamed = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and len(call.args) == (call.func.attr == "write_text")
        and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert unnamed == []


# The one file for Flower and Ray, and the process's own, for torch.
MAY_PATCH = {"fedsim.flower.patches", "fedsim.core.startup"}
# Settings of torch's, as its manual has them.
SETTINGS = ("torch.backends.", "torch.utils.deterministic.")


def patched(tree):
    """List what a tree assigns to that other modules define, and objects that it cannot tell."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if name := dotted(node, aliases):
                yield name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            yield dotted(node.args[0], aliases) or ast.unparse(node.args[0])


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_PATCH))
def test_what_other_libraries_define_is_assigned_to_in_one_file_alone(module):
    found = {name for name in patched(parse(MODULES[module])) if not name.startswith(SETTINGS)}
    assert found - {"sys"} == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import ray\nray.worker.print = None", "ray.worker.print"),
        ("from flwr.a import b as c\ndef f():\n    c.d = 1", "flwr.a.b.d"),
        ("from flwr import a\nsetattr(a, 'b', 1)", "flwr.a"),
        ("def f(state):\n    setattr(state, 'b', 1)", "state"),
        ("import ray\ndel ray.init", "ray.init"),
    ],
)
def test_the_search_finds_what_is_patched(source, name):
    assert list(patched(ast.parse(source))) == [name]


RECORDS_OF_A_MESSAGE = {"array_records", "config_records", "metric_records"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_one_module_alone_takes_messages_apart(module):
    attributes = {n.attr for n in ast.walk(parse(MODULES[module])) if isinstance(n, ast.Attribute)}
    used = attributes & RECORDS_OF_A_MESSAGE
    assert (used == set()) != (module == "fedsim.flower.messages")


COUNTS_OF_THE_MACHINE = {
    *("os.cpu_count", "multiprocessing.cpu_count", "psutil.cpu_count", "joblib.cpu_count"),
    "psutil.virtual_memory",
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_one_module_alone_counts_cores_and_memory(module):
    used = names_used(parse(MODULES[module])) & COUNTS_OF_THE_MACHINE
    assert (used == set()) != (module == "fedsim.core.allowance")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import numpy as np\nnp.random.seed(1)", "numpy.random.seed"),
        ("from numpy import random\nrandom.shuffle(x)", "numpy.random.shuffle"),
        ("from numpy.random import rand", "numpy.random.rand"),
        ("def f():\n    import random as r\n    r.choice([1])", "random.choice"),
        ("from random import sample", "random.sample"),
        ("import torch\ntorch.manual_seed(1)", "torch.manual_seed"),
        ("from torch import load", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("def f():\n    import pickle", "pickle"),
    ],
)
def test_the_search_finds_what_is_forbidden(source, name):
    assert name in {n for n in names_used(ast.parse(source)) if forbidden(n)}


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.random.Generator(np.random.PCG64(np.random.SeedSequence([1])))",
        "import numpy as np\nnp.random.RandomState(1).shuffle(x)",
        "import random\ns = random.getstate()\nrandom.setstate(s)",
        "import torchvision\ntorchvision.datasets.CIFAR100(root='x')",
        "random = 1\nrandom.choice",
    ],
)
def test_the_search_lets_local_generators_pass(source):
    assert [n for n in names_used(ast.parse(source)) if forbidden(n)] == []


def test_importing_the_lower_rooms_brings_in_neither_flower_nor_ray():
    rooms = [sorted(m for m in MODULES if m.startswith(room)) for room, *_ in ROOMS[:4]]
    assert min(map(len, rooms)) > 3
    program = (
        "import importlib, sys\n"
        f"for room in {rooms!r}:\n"
        "    for name in room: importlib.import_module(name)\n"
        "    found = {m.split('.')[0] for m in sys.modules}\n"
        "    print(sorted(found & {'flwr', 'ray', 'strategies'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["[]", "[]", "[]", "[]", ""]


def test_no_strategy_is_named_outside_of_its_own_file():
    from strategies.registry import STRATEGIES

    names = "|".join(sorted(re.escape(name) for name in STRATEGIES))
    found = re.compile(rf"\b({names})\b", re.IGNORECASE)
    named = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in (ROOT / "fedsim").rglob("*.py")
        for match in found.finditer(path.read_text(encoding="utf-8"))
    }
    assert named == set()
    for name, algorithm in STRATEGIES.items():
        home = ROOT / "strategies" / f"{name.replace('-', '_')}.py"
        assert algorithm.__module__ == f"strategies.{home.stem}"
        quoted = [
            path.name
            for path in (ROOT / "strategies").glob("*.py")
            if f'"{name}"' in path.read_text(encoding="utf-8")
        ]
        assert quoted == [home.name]


def test_captures_are_reached_through_their_list_alone():
    users = {
        module: name
        for module in MODULES
        if room_of(module) != room_of("fedsim.captures")
        for name in imported_by(module, parse(MODULES[module]))
        if name.startswith("fedsim.captures")
    }
    assert users == {}
    listed = {place for place in strings_in("fedsim.core.capture") if "fedsim.captures" in place}
    assert len(listed) == 3
    # The names that are no other word of the field.
    naming = {m for m in MODULES if "sketch" in MODULES[m].read_text(encoding="utf-8").lower()}
    assert naming == {"fedsim.core.capture", "fedsim.captures.sketch"}


def strings_in(module):
    tree = parse(MODULES[module])
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str}
