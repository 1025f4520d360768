import pytest

from fedsim.core.errors import InputError
from fedsim.plugins.compare.cells import Axis, cell_name, make_cells, parse_axis, shown, written

STRATEGIES = Axis("strategy", ("fedavgm", "delta-fedavg"))
SEEDS = Axis("seed", (2, 1))


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [
        ("strategy", "delta-fedavg,fedavgm", ("delta-fedavg", "fedavgm")),
        ("seed", "1, 2,3", (1, 2, 3)),
        ("alpha", "0.1,.5,10", (0.1, 0.5, 10)),
        ("batch-size", "[16,32],8", ([16, 32], 8)),
        ("nesterov", "true,false", (True, False)),
        ("capture", "first:1,none", ("first:1", "none")),
        ("client", "{0={batch-size=8, local-epochs=2}},{}", None),
        ("capture-layers", "['fc.*', 'a,b'],'c,d'", (["fc.*", "a,b"], "c,d")),
        ("rounds", "3", (3,)),
    ],
)
def test_values_are_read_as_flags_are(key, text, values):
    if values is None:
        values = ({"0": {"batch-size": 8, "local-epochs": 2}}, {})
    assert parse_axis(key, text) == Axis(key, values)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("seeds", "1,2", "seeds = '1,2' cannot be used; expected a known key, perhaps seed"),
        ("output", "a,b", "output = 'a,b' cannot be used; expected a key that affects the results"),
        ("seed", "1,,2", "seed = '1,,2' cannot be used; expected values separated by commas"),
        ("seed", "", "seed = '' cannot be used; expected values separated by commas"),
    ],
)
def test_what_is_no_axis_is_refused(key, text, said):
    with pytest.raises(InputError) as refused:
        parse_axis(key, text)
    assert str(refused.value).startswith(said)


def test_a_grid_is_every_combination_with_the_seed_fastest_and_names_that_follow_from_it():
    cells = make_cells({"rounds": 3}, [Axis("alpha", (1, 0.1)), SEEDS, STRATEGIES])
    assert [cell.name for cell in cells] == [
        "strategy=fedavgm,seed=2,alpha=1.0",
        "strategy=fedavgm,seed=1,alpha=1.0",
        "strategy=fedavgm,seed=2,alpha=0.1",
        "strategy=fedavgm,seed=1,alpha=0.1",
        "strategy=delta-fedavg,seed=2,alpha=1.0",
        "strategy=delta-fedavg,seed=1,alpha=1.0",
        "strategy=delta-fedavg,seed=2,alpha=0.1",
        "strategy=delta-fedavg,seed=1,alpha=0.1",
    ]
    assert cells[3].values == {"strategy": "fedavgm", "seed": 1, "alpha": 0.1}
    config = cells[3].config
    assert config.strategy.name == "fedavgm"
    assert (config.seed, config.alpha, config.rounds) == (1, 0.1, 3)


def test_a_table_is_a_value_too_and_its_settings_are_in_the_name():
    tables = """{name="fedavgm", server-momentum=0.5},{name='fedavgm', server-momentum=0.7}"""
    cells = make_cells({}, [parse_axis("strategy", f"{tables},delta-fedavg")])
    heads = [cell.name.partition("~")[0] for cell in cells]
    assert heads == ["strategy=fedavgm", "strategy=fedavgm", "strategy=delta-fedavg"]
    assert len({cell.name for cell in cells}) == 3
    assert [cell.config.to_mapping()["strategy"]["name"] for cell in cells] == [
        "fedavgm",
        "fedavgm",
        "delta-fedavg",
    ]


def test_the_order_of_asking_changes_no_name():
    one = make_cells({}, [Axis("momentum", (0.5,)), Axis("clients", (6, 8)), SEEDS])
    other = make_cells({}, [SEEDS, Axis("clients", (8, 6)), Axis("momentum", (0.5,))])
    assert {cell.name for cell in one} == {cell.name for cell in other}
    assert one[0].name == "seed=2,clients=6,momentum=0.5"


@pytest.mark.parametrize(
    ("base", "axes", "said"),
    [
        ({}, [], "nothing to compare; expected one or more of --strategies, --seeds and --vary"),
        ({}, [SEEDS, SEEDS], "seed is varied twice; name it once"),
        (
            {},
            [Axis("alpha", (1, 0.5, 1.0))],
            "the grid has alpha=1.0 twice; expected distinct values",
        ),
        (
            {},
            [Axis("seed", tuple(range(200))), Axis("rounds", tuple(range(1, 7)))],
            "the grid has 1,200 cells; expected up to 1,000",
        ),
        (
            {},
            [STRATEGIES, Axis("alpha", (1, -2))],
            "cell strategy='fedavgm',alpha=-2: alpha = -2 cannot be used; expected a value above",
        ),
        ({}, [Axis("strategy", ("best",))], "cell strategy='best': strategy = 'best' cannot be"),
        ({"clients-per-round": 8}, [Axis("clients", (8, 7))], "cell clients=7: clients-per-round"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_with_its_cell(base, axes, said):
    with pytest.raises(InputError) as refused:
        make_cells(base, axes)
    assert str(refused.value).startswith(said)


def test_a_base_that_fits_no_value_alone_is_no_hindrance():
    (cell,) = make_cells({"clients-per-round": 30}, [Axis("clients", (40,))])
    assert (cell.config.clients, cell.config.clients_per_round) == (40, 30)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("synthetic:60:3", "synthetic:60:3"),
        (0.1, "0.1"),
        (1e-05, "1e-05"),
        (True, "true"),
        (None, "null"),
        ([16, 32], "16+32"),
        ("../a", ".._a~"),
        ({"name": "fedavgm", "server-momentum": 0.5}, "fedavgm~"),
        ("20 GB", "20_GB~"),
        ([[0, 1], [2, 3]], "__0__1____2__3__~"),
    ],
)
def test_values_are_written_so_that_they_can_be_in_a_file_name(value, text):
    import hashlib
    import json

    head, tilde, _ = text.partition("~")
    raw = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    digest = hashlib.sha256(raw.encode()).hexdigest()[:8]
    assert written(value) == (f"{head}~{digest}" if tilde else text)


def test_long_names_are_cut_and_stay_apart():
    names = {
        cell_name({f"key-{i}": "v" * 50 for i in range(9)} | {"last": last}) for last in (1, 2)
    }
    assert len(names) == 2
    assert {len(name) for name in names} == {200}
    assert len({written("x" * 70 + end) for end in "ab"}) == 2
    assert len(written("x" * 70)) == 60


def test_a_strategy_with_settings_is_shown_with_them():
    assert shown({"name": "fedadam", "eta": 0.01, "tau": 1e-3}) == "fedadam(eta=0.01,tau=0.001)"
    assert shown("fedadam") == "fedadam"
    assert shown([1, 2]) == "1+2"
    # Whole, however long: only names must be short.
    table = {"name": "delta-fedavg", "dp": "server-side-fixed", "noise-multiplier": 0.5}
    assert [shown({**table, "clipping-norm": norm})[-19:] for norm in (1.0, 1.5)] == [
        ",clipping-norm=1.0)",
        ",clipping-norm=1.5)",
    ]
    assert shown([[1, 2], [3]]) == "[[1, 2], [3]]"
