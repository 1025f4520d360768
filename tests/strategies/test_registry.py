import inspect

import pytest
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.core.algorithm import Algorithm, Outcome, StrategySettings, strategy_table
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from strategies.build import build_strategy, check_strategy
from strategies.flower_builtin import FlowerBuiltin
from strategies.flower_strategy import FlowerStrategy
from strategies.recorded import Recorded
from strategies.registry import STRATEGIES
from tests.strategies.replies import Exporter, built

OURS = ("delta-fedavg", "fednova", "scaffold")
FLOWERS = {
    name: getattr(flower, getattr(algorithm, "flower", algorithm.__name__))
    for name, algorithm in STRATEGIES.items()
    if name not in OURS
}
DIFFERENT = {
    # Flower's momentum of 0, mu of 0 and choice of 1 make another strategy of these.
    "fedavgm": {"server_momentum": 0.0},
    "fedprox": {"proximal_mu": 0.0},
    "multikrum": {"num_nodes_to_select": 1},
}


def test_every_name_of_the_configuration_can_be_built_and_no_other():
    assert RunConfig().strategy.name == "delta-fedavg"
    for name, algorithm in STRATEGIES.items():
        strategy = built(name, Exporter())
        if issubclass(algorithm, FlowerBuiltin):
            assert type(strategy) is Recorded
            assert type(strategy.strategy) is FLOWERS[name]
        else:
            assert type(strategy) is FlowerStrategy
            assert type(strategy.algorithm) is algorithm


@pytest.mark.parametrize("name", FLOWERS)
def test_settings_are_flowers_own_but_where_those_make_another_strategy(name):
    signature = inspect.signature(FLOWERS[name]).parameters
    settings = strategy_table(name).own
    expected = {key: signature[key].default for key in settings}
    assert settings == expected | {k: settings[k] for k in DIFFERENT.get(name, {})}
    assert {k: expected[k] for k in DIFFERENT.get(name, {})} == DIFFERENT.get(name, {})
    # Of Flower's numbers only those about clients are not ours to know; eta_l has no effect.
    others = {"fraction_train", "fraction_evaluate", "eta_l", "min_train_nodes"}
    others |= {"min_evaluate_nodes", "min_available_nodes"}
    numbers = {k for k, p in signature.items() if isinstance(p.default, int | float)}
    assert {*settings} == numbers - others


def test_settings_reach_the_strategy():
    assert built("fedadam", eta=0.5, beta_1=0.25).algorithm.settings.eta == 0.5
    assert built("fedtrimmedavg", beta=0.25).strategy.beta == 0.25
    assert built("qfedavg").strategy.client_learning_rate == 0.01
    assert built("qfedavg", client_learning_rate=0.5).strategy.client_learning_rate == 0.5
    assert built("qfedavg").strategy.train_loss_key == "loss"
    strategy = built("krum", dp="client-side-fixed", noise_multiplier=0.0, clipping_norm=2.0)
    assert (strategy.strategy.clipping_norm, strategy.strategy.num_sampled_clients) == (2.0, 5)
    assert type(strategy.strategy.strategy) is FLOWERS["krum"]


class Own(Algorithm):
    class Settings(StrategySettings):
        trust: float = 0.5

    def fold(self, this_round):
        return Outcome(this_round.before)


def test_an_algorithm_of_the_user_takes_its_own_settings_and_refuses_others():
    strategy = built(f"{__name__}:Own", trust=0.75)
    assert (type(strategy), strategy.algorithm.settings.trust) == (FlowerStrategy, 0.75)
    for settings, said in (
        ({"trust": "much"}, "strategy.trust = 'much' cannot be used; expected a number"),
        ({"faith": 1}, "strategy.faith = 1 cannot be used; expected one of "),
    ):
        with pytest.raises(ConfigError) as refused:
            built(f"{__name__}:Own", **settings)
        assert str(refused.value).startswith(said)


class Mine(FedAvg):
    def __init__(self, trust: float = 0.5, **settings):
        super().__init__(**settings)
        self.trust = trust


class WithoutFold(Algorithm):
    pass


class Stranger(Strategy):
    def __init__(self, trust: float):
        self.trust = trust

    configure_train = configure_evaluate = aggregate_train = aggregate_evaluate = None
    summary = None


@pytest.mark.parametrize("name", ["Mine", "Stranger"])
def test_a_class_of_the_user_is_recorded_with_its_settings(name):
    strategy = built(f"{__name__}:{name}", trust=0.75)
    assert type(strategy) is Recorded
    assert type(strategy.strategy).__name__ == name
    assert strategy.strategy.trust == 0.75
    if name == "Mine":
        assert strategy.strategy.min_available_nodes == 1


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("no_such_module:Class", {}, "a class that can be imported: ModuleNotFoundError"),
        (f"{__name__}:Nobody", {}, "a class that can be imported: AttributeError"),
        (f"{__name__}:Exporter", {}, "a subclass of fedsim.core.algorithm.Algorithm or flwr."),
        (f"{__name__}:Stranger", {}, "settings that the class takes: TypeError"),
        (f"{__name__}:WithoutFold", {}, "a class that defines fold"),
        (f"{__name__}:Mine", {"faith": 1}, "settings that the class takes: TypeError"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(name, settings, said):
    config = RunConfig.from_mapping({"strategy": {"name": name, **settings}})
    for make in (lambda: build_strategy(config, {"w": (1,)}), lambda: check_strategy(config)):
        with pytest.raises(ConfigError) as refused:
            make()
        assert said in str(refused.value)
