import inspect
from typing import get_args

import pytest
from flwr.serverapp import strategy as flower

from fedsim.core.config import RunConfig
from fedsim.core.server_optimizer import SERVER_OPTIMIZERS
from strategies.delta_fedavg import DeltaFedAvg
from strategies.recorded import Recorded
from strategies.registry import NAMES, build_strategy
from tests.strategies.replies import Exporter

OPTIMIZERS = {
    "fedavgm": flower.FedAvgM,
    "fedadagrad": flower.FedAdagrad,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
}


def test_the_registry_and_the_configuration_name_the_same_strategies():
    assert get_args(RunConfig.model_fields["strategy"].annotation) == NAMES
    assert {*OPTIMIZERS} == {*SERVER_OPTIMIZERS} == {*NAMES} - {"delta-fedavg"}


def test_the_default_is_our_own_and_the_others_are_flowers():
    assert type(build_strategy("delta-fedavg", Exporter(), ["w"])) is DeltaFedAvg
    for name, kind in OPTIMIZERS.items():
        built = build_strategy(name, Exporter(), ["w"])
        assert type(built) is Recorded
        assert type(built.strategy) is kind


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_are_flowers_own_but_for_a_momentum_that_is_one(name):
    signature = inspect.signature(OPTIMIZERS[name])
    settings = dict(SERVER_OPTIMIZERS[name].settings)
    if name == "fedavgm":
        assert settings.pop("server_momentum") == 0.9
    assert settings == {key: signature.parameters[key].default for key in settings}
    # Of Flower's numbers only those about clients are not ours to know.
    others = {"fraction_train", "fraction_evaluate", "eta_l", "server_momentum"}
    numbers = {k for k, p in signature.parameters.items() if isinstance(p.default, float)}
    assert {*settings} == numbers - others
