"""CURVE keys of the control plane: two pairs, one for the coordinator and one for the workers.

    coordinator.key_secret   coordinator only            worker.key_secret   workers only
    coordinator.key          every worker                worker.key          coordinator

The coordinator lets in every key in a ``*.key`` file beside its own: that folder is the allow-list, and with several
files each host can have a key of its own. Keys are read from files only; they are in no argument, environment
variable, log or run folder.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

COORDINATOR = "coordinator"
WORKER = "worker"


@dataclass(frozen=True, slots=True, repr=False)
class Server:
    public: bytes  # as Z85 text, like all keys in files
    secret: bytes
    allowed: frozenset[bytes]  # the workers' public keys, decoded


@dataclass(frozen=True, slots=True, repr=False)
class Client:
    public: bytes
    secret: bytes
    server: bytes


def create(folder: Path) -> None:
    """Make both pairs, readable by their owner only; ValueError if there are keys, or none can be written."""
    taken = [*folder.glob(f"{COORDINATOR}.key*"), *folder.glob(f"{WORKER}.key*")]
    if taken:
        raise ValueError(f"{taken[0]} exists: choose another folder; keys are never overwritten")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (COORDINATOR, WORKER):
            zmq.auth.create_certificates(folder, name)
    except OSError as error:
        raise ValueError(
            f"{folder}: keys cannot be written there ({error.strerror}); choose another folder"
        ) from None
    finally:
        os.umask(before)


def load_server(folder: str) -> Server | None:
    """The coordinator's keys from ``control.keys``, which may be empty; ValueError if a file is not usable."""
    if not folder:
        return None
    public, secret = _pair(Path(folder, f"{COORDINATOR}.key_secret"))
    files = set(Path(folder).glob("*.key")) - {Path(folder, f"{COORDINATOR}.key")}
    if not files:
        raise ValueError(
            f"control.keys = {folder!r}: no worker's key is there, so nobody could join; copy worker.key into it"
        )
    return Server(public, secret, frozenset(zmq.utils.z85.decode(_read(path)[0]) for path in files))


def load_client(folder: str) -> Client | None:
    """A worker's keys from ``control.keys``, which may be empty; ValueError if a file is not usable."""
    if not folder:
        return None
    public, secret = _pair(Path(folder, f"{WORKER}.key_secret"))
    return Client(public, secret, _read(Path(folder, f"{COORDINATOR}.key"))[0])


def _pair(path: Path) -> tuple[bytes, bytes]:
    public, secret = _read(path)
    if secret is None:
        raise ValueError(f"control.keys: {path} has no secret key: make new ones with scpl-dist keys new DIR")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"control.keys: {path} can be read by others (mode {mode:o}): run chmod 600 {path}")
    return public, secret


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None and len(zmq.utils.z85.decode(key)) != 32:
                raise ValueError("not a key of 32 bytes")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"control.keys: {path} is no readable key file ({error}); scpl-dist keys new DIR makes all four files"
        ) from None
    return public, secret
