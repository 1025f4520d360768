from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedsim import cli
from fedsim.plugins.deploy.federation import Federation, Places, is_host
from fedsim.plugins.deploy.init import init
from tests.patience import PATIENCE
from tests.plugins.deploy.conftest import ROOT
from tests.ports import free_ports

ALL = "0.0.0.0"  # noqa: S104 - what is listened at


@pytest.fixture
def made(tmp_path, capsys):
    """Make a federation and give its folder and what was said on stderr."""

    def init(*flags):
        folder = tmp_path / "federation"
        assert cli.run(["deploy", "init", str(folder), *flags]) == 0
        return folder, capsys.readouterr().err

    return init


def refusal(capsys, *arguments):
    assert cli.run(["deploy", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_federation_has_what_its_hosts_need(made):
    folder, said = made("--supernodes", "2")
    assert said == ""
    of_node = {"node.toml", "node.key", "ca.crt", "fedsim-supernode.service", "compose.yaml"}
    of_server = {"ca.crt", "server.crt", "server.key", "nodes/0.pub", "nodes/1.pub"}
    assert files(folder) == {
        *(".gitignore", "federation.toml", "flwr/config.toml", "compose.yaml", "Dockerfile"),
        *("ca/ca.crt", "ca/ca.key"),
        *(f"server/{name}" for name in of_server),
        *("server/fedsim-superlink.service", "server/fedsim-gateway.service"),
        *(f"nodes/{number}/{name}" for number in (0, 1) for name in of_node),
    }
    assert Federation.read(folder) == Federation(supernodes=2)


def test_all_of_it_is_for_its_owner_alone(made):
    mask = os.umask(0)
    try:
        folder, _ = made()
    finally:
        os.umask(mask)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [folder, *folder.rglob("*")]}
    assert {modes[p] for p in modes if p.is_dir()} == {0o700}
    assert {modes[p] for p in modes if p.is_file()} == {0o600}


def test_a_private_key_is_where_it_is_needed_and_nowhere_else(made):
    folder, _ = made("--supernodes", "3")
    private = {name for name in files(folder) if b"PRIVATE KEY" in (folder / name).read_bytes()}
    assert private == {"ca/ca.key", "server/server.key", *(f"nodes/{i}/node.key" for i in range(3))}
    assert len({(folder / name).read_bytes() for name in private}) == 5


def test_a_repository_around_it_takes_nothing_of_it(made, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    folder, _ = made()
    told = subprocess.run(
        ["git", "-C", tmp_path, "status", "--short", "-uall"], capture_output=True, text=True
    )
    assert (told.stdout, told.stderr) == ("", "")
    assert (folder / "server" / "server.key").is_file()


def test_an_image_has_what_is_installed_and_nothing_that_lies_beside_it(made):
    folder, _ = made("--supernodes", "1")
    ignored, *kept = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ignored == "*"
    for path in (folder / "Dockerfile", ROOT / "examples" / "Dockerfile"):
        copied = re.findall(r"(?m)^COPY (.*)$", path.read_text())
        names = {name for line in copied for name in line.split()[:-1]}
        assert {"pyproject.toml", "constraints.txt", "README.md", "fedsim", "strategies"} <= names
        for name in names:
            assert f"!{name}{'/' if (ROOT / name).is_dir() else ''}" in kept
        known = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "--error-unmatch", *names], capture_output=True
        )
        assert known.returncode == 0


def test_a_node_file_says_what_the_node_holds_and_allows(made, tmp_path):
    folder, _ = made("--data-root", str(tmp_path), "--capture")
    node = Places(folder).node(2)
    assert tomllib.loads((node / "node.toml").read_text()) == {
        "partition-id": 2,
        "num-partitions": 4,
        "data-root": str(tmp_path),
        "recordings": str(node / "recordings"),
        "capture": True,
    }


def test_nodes_allow_no_capture_unless_told(made):
    folder, _ = made()
    values = tomllib.loads((folder / "nodes" / "0" / "node.toml").read_text())
    assert values["capture"] is False
    assert "data-root" not in values


def test_runs_are_started_through_the_superlinks_own_port(made):
    folder, _ = made("--address", "fl.example.org", "--port", "7000")
    connection = tomllib.loads((folder / "flwr" / "config.toml").read_text())["superlink"]
    assert connection["default"] == "federation"
    assert connection["federation"] == {
        "address": "127.0.0.1:7001",
        "root-certificates": str(folder / "ca" / "ca.crt"),
    }
    unit = (folder / "nodes" / "0" / "fedsim-supernode.service").read_text()
    assert "--superlink fl.example.org:7000" in unit


def test_without_tls_and_keys_only_when_asked_and_with_a_warning(made):
    folder, said = made("--insecure", "--supernodes", "1")
    assert said.startswith("fedsim: insecure: anyone who reaches the server may join")
    assert not any(name.endswith((".key", ".crt", ".pub")) for name in files(folder))
    texts = "".join((folder / name).read_text() for name in sorted(files(folder)))
    assert "auth" not in texts.replace("author", "")
    assert texts.count("--insecure") == 4


def test_the_same_is_never_written_twice(made, capsys):
    folder, _ = made()
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert "exists already" in refusal(capsys, "init", folder)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--supernodes", "0"], "supernodes = 0 cannot be used; expected 1 to 10000"),
        (["--supernodes", "x"], "--supernodes = 'x' cannot be used; expected a whole number"),
        (["--port", "65531"], "port = 65531 cannot be used; expected 1 to 65530"),
        (["--port", "0"], "port = 0"),
        (["--address", "a b"], "address = 'a b' cannot be used; expected a host name"),
        (["--address", 'x"\ny'], "address = "),
        (["--address", 'fe80::1%"x'], "address = 'fe80::1%\"x' cannot be used"),
        (["--address", "10.0.0.256"], "address = '10.0.0.256' cannot be used"),
        (
            ["--listen", "localhost"],
            "listen = 'localhost' cannot be used; expected an IP address",
        ),
        (["--listen", "fe80::1%eth0"], "listen = 'fe80::1%eth0' cannot be used"),
        (["--days", "0"], "days = 0 cannot be used; expected 1 to 36500"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, capsys, flags, said):
    told = refusal(capsys, "init", tmp_path / "new", *flags)
    assert said in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_certificate_is_renewed_by_the_same_authority(made, capsys):
    folder, _ = made("--supernodes", "1", "--days", "1")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert cli.run(["deploy", "renew", str(folder), "--days", "30"]) == 0
    after = {name: (folder / name).read_bytes() for name in files(folder)}
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"server/server.crt", "server/server.key"}
    assert stat.S_IMODE((folder / "server" / "server.key").stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate(after["server/server.crt"])
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(after["ca/ca.crt"]))
    valid = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert valid.days == 30
    (folder / "ca" / "ca.key").unlink()
    assert "cannot be given another certificate" in refusal(capsys, "renew", folder)


def test_a_certificate_does_not_outlive_the_authority(made, capsys):
    folder, _ = made("--supernodes", "1")
    assert "days = 3650 cannot be used; expected 1 to 3649, as long as" in refusal(
        capsys, "renew", folder, "--days", 3650
    )
    assert cli.run(["deploy", "renew", str(folder), "--days", "3649"]) == 0
    federation = Federation.read(folder)
    shutil.rmtree(folder)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3650)
    init(folder, federation, now=long_ago)
    before = (folder / "server" / "server.crt").read_bytes()
    assert "the authority of this federation expired on 20" in refusal(capsys, "renew", folder)
    assert (folder / "server" / "server.crt").read_bytes() == before


def test_a_renewal_that_was_killed_halfway_is_told_and_done_again(made, capsys):
    folder, _ = made("--supernodes", "1")
    server = folder / "server"
    key = (server / "server.key").read_bytes()
    assert cli.run(["deploy", "renew", str(folder)]) == 0
    (server / "server.key").rename(server / ".server.key")
    (server / "server.key").write_bytes(key)
    told = refusal(capsys, "gateway", folder)
    assert f"server.key of {server} cannot be used: KEY_VALUES_MISMATCH; expected " in told
    assert told.count("\n") == 1
    assert cli.run(["deploy", "renew", str(folder)]) == 0
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    assert not (server / ".server.key").exists()


def test_a_node_is_given_another_key(made, capsys):
    folder, _ = made("--supernodes", "2")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    # Its folder is on its host.
    shutil.rmtree(folder / "nodes" / "1")
    assert cli.run(["deploy", "renew", str(folder), "--node", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "does not answer" in told[-2]
    command = "flwr supernode unregister NODE-ID federation   (takes the old key away)"
    assert told[-1] == f"FLWR_HOME={folder}/flwr {command}"
    after = {name: (folder / name).read_bytes() for name in files(folder)}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"nodes/1/node.key", "server/nodes/1.pub"}
    for name in changed:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    private = serialization.load_ssh_private_key(after["nodes/1/node.key"], None)
    public = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    assert after["server/nodes/1.pub"] == public + b" partition-1\n"
    assert "node = 2 cannot be used; expected 0 to 1" in refusal(
        capsys, "renew", folder, "--node", 2
    )
    assert "--days is for the server's certificate" in refusal(
        capsys, "renew", folder, "--node", 1, "--days", 3
    )


@pytest.mark.parametrize("step", ["start", "register", "gateway", "renew"])
def test_what_is_no_federation_is_refused(tmp_path, capsys, step):
    assert "is not a federation" in refusal(capsys, step, tmp_path)
    (tmp_path / "federation.toml").write_text("port = 'x'\n")
    assert "federation.toml cannot be read" in refusal(capsys, step, tmp_path)


@pytest.mark.parametrize("step", ["register", "gateway", "renew"])
def test_an_insecure_federation_has_no_keys_and_no_gateway(made, capsys, step):
    folder, _ = made("--insecure")
    assert "is insecure: it" in refusal(capsys, step, folder)
    assert "is insecure: it" in refusal(capsys, "renew", folder, "--node", 0)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        *((name, True) for name in ("localhost", "a-b.example.org", "10.0.0.1", "::1", "fe80::1")),
        *((name, False) for name in ("", "a_b", "-a.org", "a..b", "h:80", "ä.org", "a" * 64)),
        *((name, True) for name in ("1.a", "a.1b", "2001:db8::1")),
        *(
            (name, False)
            for name in ("10.0.0.256", "10.0.0", "7", ALL, "::", "224.0.0.1", "ff02::1")
        ),
        *((name, False) for name in ("fe80::1%eth0", 'fe80::1%"x', "fe80::1%")),
    ],
)
def test_hosts_are_names_or_addresses(text, allowed):
    assert is_host(text) is allowed


@pytest.mark.parametrize("name", ["federation", "a b", "50%n", "it's $HOME", 'a "b" \\c'])
def test_systemd_takes_the_units(tmp_path, name):
    folder = tmp_path / name / "federation"
    init(folder, Federation(supernodes=1))
    units = sorted(folder.rglob("*.service"))
    assert len(units) == 3
    for unit in units:
        text = re.sub(r"(?m)^User=.*\n", "", unit.read_text())
        unit.write_text(text)
        told = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=PATIENCE
        )
        about_it = [line for line in told.stderr.splitlines() if unit.name in line]
        assert about_it == []


def test_commands_of_compose_files_are_those_of_the_units(made):
    folder, _ = made("--supernodes", "1")
    for path, unit in (
        (folder / "compose.yaml", "server/fedsim-superlink.service"),
        (folder / "nodes" / "0" / "compose.yaml", "nodes/0/fedsim-supernode.service"),
    ):
        command = json.loads(re.search(r"(?m)^    command: (.*)$", path.read_text())[1])
        assert " ".join(command) in (folder / unit).read_text()


@pytest.mark.parametrize(
    ("address", "listen"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.1.1", "127.0.1.1"),
        ("::1", "::1"),
        ("localhost", "127.0.0.1"),
        ("fl.example.org", ALL),
        ("203.0.113.7", ALL),
        ("2001:db8::7", "::"),
    ],
)
def test_it_listens_where_the_address_may_be_another_hosts(address, listen):
    assert Federation(address=address).listen == listen


def test_where_to_listen_is_kept_and_is_dockers_where_there_are_containers(made):
    folder, _ = made("--address", "fl.example.org", "--listen", "10.0.0.5", "--port", "7000")
    assert Federation.read(folder).listen == "10.0.0.5"
    # As `fedsim deploy init` wrote it before it knew `listen`.
    old = [x for x in (folder / "federation.toml").read_text().splitlines() if "listen" not in x]
    (folder / "federation.toml").write_text("\n".join(old))
    assert Federation.read(folder).listen == ALL
    compose = (folder / "compose.yaml").read_text()
    assert 'ports: ["10.0.0.5:7000:7000"]' in compose
    assert '"gateway", "--listen", "0.0.0.0", "/federation"]' in compose


def test_an_insecure_superlink_listens_there_itself(made):
    folder, _ = made("--insecure", "--address", "fl.example.org", "--port", "7000")
    assert "--host 0.0.0.0 --port 7000" in (folder / "server/fedsim-superlink.service").read_text()
    user = tomllib.loads((folder / "flwr" / "config.toml").read_text())
    assert user["superlink"]["federation"]["address"] == "127.0.0.1:7000"


@pytest.mark.parametrize("step", ["gateway", "start"])
def test_what_cannot_be_listened_at_is_refused_in_a_sentence(made, capsys, step):
    port = free_ports(4)
    taken = socket.create_server(("127.0.0.1", port))
    folder, _ = made("--port", str(port), "--supernodes", "1")
    allowed = "expected an address of this host, with a port that is free\n"
    reason = "cannot be listened on: Address already in use"
    told = refusal(capsys, step, folder)
    assert told == f"fedsim: 127.0.0.1:{port} {reason}; {allowed}"
    taken.close()
    elsewhere = replace(Federation.read(folder), listen="192.0.2.1")
    (folder / "federation.toml").write_text(elsewhere.to_toml())
    reason = "cannot be listened on: Cannot assign requested address"
    told = refusal(capsys, step, folder)
    assert told == f"fedsim: 192.0.2.1:{port} {reason}; {allowed}"
    assert not (folder / "logs").exists()


def test_nothing_is_left_where_it_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refusal(capsys, "init", tmp_path / "file" / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert Path(tmp_path / "file").read_text() == ""
