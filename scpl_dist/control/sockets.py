"""The two sockets of the control plane, made here only, so that keys have one place at each end."""

from __future__ import annotations

import secrets
from typing import Any

import zmq

from scpl_dist.control.admission import Admission
from scpl_dist.control.codec import MAX_BYTES
from scpl_dist.control.keys import Client, Server
from scpl_dist.run.network import resolve

QUEUED = 1000  # messages of a connection, at either end


def _configured(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """What both ends set: nothing is unlimited.

    A vanished host is noticed by its silence, which both ends watch. Heartbeats of ZeroMQ would break the connection
    to a process that is only stopped for a moment, and lose messages.
    """
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.set_hwm(QUEUED)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    return socket


def router(
    context: zmq.Context[Any], host: str, port: int, keys: Server | None = None
) -> tuple[zmq.Socket[bytes], str, Admission]:
    """The coordinator's socket, its endpoint and its guard; ValueError if the address cannot be bound."""
    address = resolve(host, "control.host")
    socket = _configured(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a peer that is gone is not lost in silence
    socket.setsockopt(zmq.RCVHWM, QUEUED // 10)  # so much memory, in MAX_BYTES, can a stranger fill
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that reconnects takes its name over
    literal = f"[{address}]" if ":" in address else address
    socket.setsockopt(zmq.IPV6, ":" in address)
    admission = Admission(context, socket, keys)
    try:
        socket.bind(f"tcp://{literal}:{port or '*'}")
    except zmq.ZMQError as error:
        admission.close()
        socket.close()
        raise ValueError(
            f"control.host = {host!r}, control.port = {port}: cannot listen there ({error.strerror}); choose "
            "an address of this host or another port; with the local launcher, -o control.port=0 takes any free one"
        ) from None
    return socket, socket.get_string(zmq.LAST_ENDPOINT), admission


def dealer(context: zmq.Context[Any], address: str, keys: Client | None = None) -> zmq.Socket[bytes]:
    """A worker's socket, to be connected to `address` such as "tcp://127.0.0.1:4711" once its events are watched."""
    socket = _configured(context.socket(zmq.DEALER))
    socket.setsockopt(zmq.ROUTING_ID, b"w" + secrets.token_bytes(15))  # nobody can guess it and take over
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.IPV6, "[" in address)
    if keys is not None:
        socket.curve_publickey = keys.public
        socket.curve_secretkey = keys.secret
        socket.curve_serverkey = keys.server
    return socket
