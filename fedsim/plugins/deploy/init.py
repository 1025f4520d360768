"""Writing the folder of a federation."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fedsim.core.errors import ConfigError, InputError
from fedsim.plugins.deploy import texts
from fedsim.plugins.deploy.certificates import Certified, make_authority, make_node_key, make_server
from fedsim.plugins.deploy.federation import Federation, Places

_MOST_DAYS = 36_500
_AUTHORITY_DAYS = 3_650


def init(
    folder: Path,
    federation: Federation,
    *,
    days: int = 365,
    data_root: Path | None = None,
    capture: bool = False,
    now: datetime.datetime | None = None,
) -> None:
    """Make the folder of a federation: certificates, keys, configuration, units of services.

    All of it, or nothing: it is written beside and renamed. Folders are for their owner alone
    (mode 0700), and so are files (0600).

    Parameters
    ----------
    folder : Path
        The folder to make.
    federation : Federation
        What to make.
    days : int
        For how long the certificates are valid.
    data_root : Path, optional
        Where the nodes find the shared dataset.
    capture : bool
        Whether the nodes allow that their gradients are captured.
    now : datetime, optional
        From when the certificates are valid.

    Raises
    ------
    InputError
        When the folder exists or cannot be made.
    """
    _check_days(days)
    folder = folder.absolute()
    if not str(folder).isprintable():
        raise InputError(f"{str(folder)!r} cannot be used; expected a path of printable letters")
    if os.path.lexists(folder):
        raise InputError(
            f"{folder} exists already; expected a new folder, since keys are never overwritten"
        )
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of mode 0700, as all folders below.
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_all(beside, folder, federation, days, data_root, capture, now)
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None


def renew(folder: Path, *, days: int = 365, now: datetime.datetime | None = None) -> None:
    """Make another certificate for the server of a federation, in place of the one it has.

    Parameters
    ----------
    folder : Path
        What `init` made, with the key of its authority.
    days : int
        For how long it is valid.
    now : datetime, optional
        From when.

    Raises
    ------
    ConfigError
        When the certificate would outlive that of the authority, which nobody trusts then.
    InputError
        When there is no federation, or the key of its authority is elsewhere.
    """
    _check_days(days)
    places = Places(folder.absolute())
    federation = Federation.read(places.root)
    if federation.insecure:
        raise InputError(f"{folder} is insecure: it has no certificate")
    try:
        authority = Certified(places.authority.read_bytes(), places.authority_key.read_bytes())
        now = now or datetime.datetime.now(datetime.UTC)
        _check_end(authority, now, days)
        server = make_server(authority, federation.hosts, now, days)
        _replace(
            {
                places.server / "server.crt": server.certificate,
                places.server / "server.key": server.private_key,
            }
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be given another certificate: {error}") from None


def renew_node(folder: Path, number: int) -> tuple[Path, Path, bytes | None]:
    """Make another key for a node, in place of one that was lost or told.

    Parameters
    ----------
    folder : Path
        What `init` made.
    number : int
        The node's partition.

    Returns
    -------
    tuple of Path, Path and bytes or None
        Where the private and the public key are, and the public key that was there.

    Raises
    ------
    ConfigError
        When there is no such node.
    InputError
        When there is no federation, or it has no keys.
    """
    places = Places(folder.absolute())
    federation = Federation.read(places.root)
    if federation.insecure:
        raise InputError(f"{folder} is insecure: it has no keys")
    if not 0 <= number < federation.supernodes:
        raise ConfigError("node", number, f"0 to {federation.supernodes - 1}")
    key = make_node_key(f"partition-{number}")
    private, public = places.node(number) / "node.key", places.public_key(number)
    try:
        replaced = public.read_bytes() if public.exists() else None
        _replace({private: key.private_key, public: key.public_key})
    except OSError as error:
        raise InputError(f"{folder} cannot be given another key: {error}") from None
    return private, public, replaced


def _replace(contents: Mapping[Path, bytes]) -> None:
    # Who reads them meets each whole, at any moment.
    for path, content in contents.items():
        beside = path.with_name(f".{path.name}")
        beside.unlink(missing_ok=True)
        _write(beside, content)
    for path in contents:
        path.with_name(f".{path.name}").replace(path)


def _check_end(authority: Certified, now: datetime.datetime, days: int) -> None:
    left = (authority.not_valid_after - now).days
    if left < 1:
        raise InputError(
            f"the authority of this federation expired on {authority.not_valid_after:%Y-%m-%d}; "
            "expected another federation, which `fedsim deploy init` makes"
        )
    if days > left:
        raise ConfigError("days", days, f"1 to {left}, as long as the authority is valid")


def _check_days(days: int) -> None:
    if not 1 <= days <= _MOST_DAYS:
        raise ConfigError("days", days, f"1 to {_MOST_DAYS}")


def _write_all(
    root: Path,
    final: Path,
    federation: Federation,
    days: int,
    data_root: Path | None,
    capture: bool,
    now: datetime.datetime,
) -> None:
    places, later = Places(root), Places(final)
    # Keys and data are not for a repository that the folder happens to be in.
    _write(root / ".gitignore", "*\n")
    _write(places.federation, federation.to_toml())
    _write(places.user / "config.toml", texts.flower_config(federation, later.authority))
    unit = texts.superlink_unit(federation, later.server)
    _write(places.server / "fedsim-superlink.service", unit)
    _write(places.root / "compose.yaml", texts.server_compose(federation))
    _write(places.root / "Dockerfile", texts.dockerfile())
    if not federation.insecure:
        authority = make_authority("fedsim federation", now, max(days, _AUTHORITY_DAYS))
        server = make_server(authority, federation.hosts, now, days)
        _write(places.authority, authority.certificate)
        _write(places.authority_key, authority.private_key)
        _write(places.server / "ca.crt", authority.certificate)
        _write(places.server / "server.crt", server.certificate)
        _write(places.server / "server.key", server.private_key)
        _write(places.server / "fedsim-gateway.service", texts.gateway_unit(later.server))
    for number in range(federation.supernodes):
        node, there = places.node(number), later.node(number)
        _write(
            node / "node.toml",
            texts.node_config(
                federation,
                number,
                recordings=there / "recordings",
                data_root=data_root,
                capture=capture,
            ),
        )
        unit = texts.supernode_unit(federation, number, there)
        _write(node / "fedsim-supernode.service", unit)
        _write(node / "compose.yaml", texts.node_compose(federation, number))
        if not federation.insecure:
            key = make_node_key(f"partition-{number}")
            _write(node / "ca.crt", authority.certificate)
            _write(places.public_key(number), key.public_key)
            _write(node / "node.key", key.private_key)


def _write(path: Path, content: str | bytes) -> None:
    # The mode of `mkdir(parents=True)` is that of the last folder only.
    for folder in reversed([p for p in path.parents if not p.exists()]):
        folder.mkdir(mode=0o700)
    data = content.encode() if isinstance(content, str) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
