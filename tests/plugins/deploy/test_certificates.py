from __future__ import annotations

import base64
import datetime
import ipaddress
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509 import verification

from fedsim.plugins.deploy.certificates import make_authority, make_node_key, make_server
from fedsim.plugins.deploy.gateway import fingerprint

NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


def days(number):
    return NOW + datetime.timedelta(days=number)


def check(authority, server, name, moment):
    """Verify a chain as a client that trusts the authority does."""
    subject = (
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
    )
    trusted = verification.Store([x509.load_pem_x509_certificate(authority.certificate)])
    builder = verification.PolicyBuilder().store(trusted).time(moment)
    verifier = builder.build_server_verifier(subject)
    return verifier.verify(x509.load_pem_x509_certificate(server.certificate), [])


@pytest.fixture(scope="module")
def authority():
    return make_authority("ours", NOW, 3650)


@pytest.fixture(scope="module")
def server(authority):
    return make_server(authority, ["fl.example.org", "localhost", "127.0.0.1"], NOW, 30)


@pytest.mark.parametrize("name", ["fl.example.org", "localhost", "127.0.0.1"])
def test_a_server_is_trusted_under_each_of_its_names(authority, server, name):
    assert len(check(authority, server, name, days(29))) == 2


@pytest.mark.parametrize(
    ("name", "moment"),
    [("localhost", days(31)), ("localhost", days(-1)), ("other.org", days(1)), ("127.0.0.2", NOW)],
)
def test_a_server_is_not_trusted_at_another_time_or_under_another_name(
    authority, server, name, moment
):
    with pytest.raises(verification.VerificationError):
        check(authority, server, name, moment)


def test_a_server_of_another_authority_is_not_trusted(server):
    with pytest.raises(verification.VerificationError):
        check(make_authority("ours", NOW, 3650), server, "localhost", NOW)


def test_a_server_can_sign_nothing(authority, server):
    forged = make_server(server, ["localhost"], NOW, 30)
    with pytest.raises(verification.VerificationError):
        check(authority, forged, "localhost", NOW)


def test_keys_fit_their_certificates_and_are_on_the_curve_p_384(authority, server):
    for made in (authority, server):
        key = load_pem_private_key(made.private_key, password=None)
        assert isinstance(key.curve, ec.SECP384R1)
        certificate = x509.load_pem_x509_certificate(made.certificate)
        assert key.public_key() == certificate.public_key()


def test_a_node_key_is_what_flower_takes():
    made = make_node_key("partition-3")
    private = load_ssh_private_key(made.private_key, password=None)
    public = load_ssh_public_key(made.public_key)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert made.public_key.startswith(b"ecdsa-sha2-nistp384 ")
    assert made.public_key.endswith(b" partition-3\n")
    assert make_node_key("partition-3").private_key != made.private_key


def test_a_fingerprint_is_that_of_ssh_keygen(tmp_path):
    made = make_node_key("me")
    (tmp_path / "node.pub").write_bytes(made.public_key)
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "node.pub"], capture_output=True, text=True
    )
    found = fingerprint(load_ssh_public_key(made.public_key))
    assert told.stdout == f"384 {found} me (ECDSA)\n"
    assert len(base64.b64decode(found.removeprefix("SHA256:") + "=")) == 32
