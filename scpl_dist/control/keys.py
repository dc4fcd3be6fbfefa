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

COORDINATOR, WORKER = "coordinator", "worker"


@dataclass(frozen=True, slots=True, repr=False)
class Server:
    """The coordinator's keys: its own pair and those it lets in, as Z85 text in bytes."""

    public: bytes
    secret: bytes
    allowed: frozenset[bytes]


@dataclass(frozen=True, slots=True, repr=False)
class Client:
    """A worker's keys: its own pair, and the coordinator's public key."""

    public: bytes
    secret: bytes
    server: bytes


def create(folder: Path) -> list[Path]:
    """Make both pairs. Secret files can be read by their owner only.

    Raises:
        ValueError: there are keys already, or the folder cannot be written.
    """
    taken = [path for name in (COORDINATOR, WORKER) for path in folder.glob(f"{name}.key*")]
    if taken:
        raise ValueError(f"{taken[0]} exists: choose another folder; keys are never overwritten")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [
            Path(file)
            for name in (COORDINATOR, WORKER)
            for file in zmq.auth.create_certificates(folder, name)
        ]
    except OSError as error:
        raise ValueError(
            f"{folder}: keys cannot be written there ({error.strerror}); choose another folder"
        ) from None
    finally:
        os.umask(before)
    return files


def load_server(folder: str) -> Server | None:
    """The coordinator's keys from ``control.keys``; None if that is empty.

    Raises:
        ValueError: a file is missing, is no key, or is open to others.
    """
    if not folder:
        return None
    public, secret = _pair(Path(folder, f"{COORDINATOR}.key_secret"))
    own = f"{COORDINATOR}.key"
    allowed = frozenset(_read(path)[0] for path in sorted(Path(folder).glob("*.key")) if path.name != own)
    if not allowed:
        raise ValueError(
            f"control.keys = {folder!r}: no worker's key is there, so nobody could join; copy {WORKER}.key into it"
        )
    return Server(public, secret, allowed)


def load_client(folder: str) -> Client | None:
    """A worker's keys from ``control.keys``; None if that is empty.

    Raises:
        ValueError: a file is missing, is no key, or is open to others.
    """
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
