"""Certificates of a federation and keys of its nodes, as PEM."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CLOCKS_APART = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Certified:
    """A private key with the certificate of its public half.

    Parameters
    ----------
    certificate : bytes
        PEM.
    private_key : bytes
        PEM, PKCS 8, unencrypted.
    """

    certificate: bytes
    private_key: bytes

    @property
    def not_valid_after(self) -> datetime.datetime:
        """Until when the certificate is valid, in UTC."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


@dataclass(frozen=True)
class NodeKey:
    """The key by which a node proves who it is, on the curve NIST P-384.

    Parameters
    ----------
    public_key : bytes
        One line as OpenSSH writes it, which `flwr supernode register` takes.
    private_key : bytes
        PEM as OpenSSH writes it, unencrypted, which `flower-supernode` takes.
    """

    public_key: bytes
    private_key: bytes


def make_authority(name: str, now: datetime.datetime, days: int) -> Certified:
    """Make a certificate authority that signs certificates of servers and nothing else.

    Parameters
    ----------
    name : str
        Its common name.
    now : datetime
        From when it is valid, with its time zone.
    days : int
        For how long.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Certified(_pem(certificate), _private_pem(key))


def make_server(
    authority: Certified, hosts: Sequence[str], now: datetime.datetime, days: int
) -> Certified:
    """Make the certificate of a server that is reached by any of some names.

    Parameters
    ----------
    authority : Certified
        Who signs.
    hosts : sequence of str
        Host names and IP addresses; the first is the common name.
    now : datetime
        From when it is valid, with its time zone.
    days : int
        For how long.
    """
    signer = x509.load_pem_x509_certificate(authority.certificate)
    signing_key = serialization.load_pem_private_key(authority.private_key, password=None)
    if not isinstance(signing_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key of the authority is not of an elliptic curve")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(subject, signer.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name_of(h) for h in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
        .sign(signing_key, hashes.SHA384())
    )
    return Certified(_pem(certificate), _private_pem(key))


def make_node_key(comment: str) -> NodeKey:
    """Make the key of a node.

    Parameters
    ----------
    comment : str
        What the line of the public key ends with.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return NodeKey(public + f" {comment}\n".encode(), private)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name_of(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
