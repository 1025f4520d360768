from __future__ import annotations

import stat
import threading

import pytest

from fedsim.core.errors import InputError
from fedsim.plugins.deploy.federation import Federation, Places
from fedsim.plugins.deploy.init import init
from fedsim.plugins.deploy.start import start
from tests.ports import free_ports


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path / "federation")
    init(made.root, Federation(port=free_ports(4), supernodes=2))
    return made


def refused(places):
    told = []
    with pytest.raises(InputError) as refusal:
        start(places.root, told.append, threading.Event())
    assert (told, places.logs.exists()) == ([], False)
    return str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["nodes/1/node.key", "nodes/0/ca.crt", "server/server.key", "server/nodes/1.pub", "ca/ca.crt"],
)
def test_a_file_that_is_not_there_is_told_before_anything_is_started(places, name):
    (places.root / name).unlink()
    assert refused(places) == (
        f"{places.root / name} does not exist; expected what `fedsim deploy init` made, of which "
        "only whole folders of nodes may be elsewhere"
    )


@pytest.mark.slow
def test_a_node_whose_folder_was_moved_away_runs_elsewhere(tmp_path):
    places = Places(tmp_path / "federation")
    federation = Federation(port=free_ports(4), supernodes=2, insecure=True)
    init(places.root, federation)
    places.node(1).rename(tmp_path / "elsewhere")
    stop = threading.Event()
    told = []

    def tell(line):
        told.append(line)
        if "Ctrl-C" in line:
            stop.set()

    start(places.root, tell, stop)
    assert told == [
        f"1 SuperNodes at 127.0.0.1:{federation.port}; their logs are in {places.logs}",
        "elsewhere, since their folders are: the nodes of partitions 1",
        f"FLWR_HOME={places.user} flwr run . federation --stream   (Ctrl-C here ends all)",
    ]
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in places.logs.iterdir()}
    assert modes == {"superlink.log": 0o600, "supernode-0.log": 0o600}
