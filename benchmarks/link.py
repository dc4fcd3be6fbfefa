"""A switch between network namespaces that is as slow and as far away as is wanted.

    python -m benchmarks.link DELAY_MS MBITS PORT...        inside the namespace that has these interfaces

Every frame leaves its port when those before it have left, at so many megabits per second and direction, and arrives
so much later at the port of its receiver. In place of a kernel's netem, which many kernels do not have. Frames are
those that the kernel has not cut to packets yet (`PACKET_VNET_HDR`), so there are few of them. Ends with its parent.
"""

from __future__ import annotations

import heapq
import select
import socket
import sys
import time

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # of <linux/if_packet.h>
HEADER = 10  # bytes of a virtio_net_hdr: what is still to be done to the frame
ALL_PROTOCOLS = 3
LARGEST = 1 << 17


def _port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def relay(ports: list[socket.socket], delay_s: float, bytes_per_s: float) -> None:
    """Pass frames on until standard input ends."""
    waiting: list[tuple[float, int, int, bytes]] = []  # when, in which order, at which port, what
    free = [0.0] * len(ports)  # when a port has sent all that it was given
    places: dict[bytes, int] = {}  # port of each address
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select([*ports, sys.stdin], [], [], pause)[0]
        if sys.stdin in ready:
            return
        for source, port in enumerate(ports):
            if port not in ready:
                continue
            frame = port.recv(LARGEST)
            target, sender = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
            places[sender] = source
            free[source] = max(free[source], time.monotonic()) + (len(frame) - HEADER) / bytes_per_s
            others = [index for index in range(len(ports)) if index != source]
            for index in [places[target]] if target in places else others:
                number += 1
                heapq.heappush(waiting, (free[source] + delay_s, number, index, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, index, frame = heapq.heappop(waiting)
            ports[index].send(frame)


if __name__ == "__main__":
    delay_ms, mbits, *names = sys.argv[1:]
    relay([_port(name) for name in names], float(delay_ms) / 1000, float(mbits) * 1e6 / 8)
