"""The transport between real processes."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from scpl_dist.transport import Aborted, Message, PeerLost, Transport
from scpl_dist.transport.rpc import RpcTransport

CPU = torch.device("cpu")
Body = Callable[[Transport, "mp.SimpleQueue[Any]"], None]


def start(rank: int, port: int, body: Body, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    transport = RpcTransport(rank, 2, "generation", max_in_flight=2, device=CPU)
    transport.connect()
    body(transport, results)
    transport.close()
    os._exit(0)


class Pair:
    """Two processes, each with one end of a transport."""

    def __init__(self) -> None:
        self.context = mp.get_context("spawn")
        self.results = self.context.Queue()
        self.processes: list[Any] = []

    def run(self, first: Body, second: Body) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, body in enumerate((first, second)):
            process = self.context.Process(target=start, args=(rank, port, body, self.results))
            process.start()
            self.processes.append(process)

    def result(self) -> Any:
        return self.results.get(timeout=30)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for process in made.processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"process {process.pid} did not end")
        process.close()


def payload(number: int) -> Any:
    """A pytree whose size varies from message to message; one tensor is not contiguous, one is empty."""
    generator = torch.Generator().manual_seed(number)
    rows = 1 + 997 * number % 301
    image = (
        torch.rand(rows, 8, 4, generator=generator).to(memory_format=torch.contiguous_format).transpose(1, 2)
    )
    return (image, {"labels": torch.arange(rows), "none": torch.empty(0)})


COUNT = 120


def send_many(transport: Transport, results: Any) -> None:
    for number in range(COUNT):
        transport.wait_for_room(1)
        transport.post(1, Message({"sequence": number}, number % 3, payload(number)))
    transport.wait_for_room(1)
    answer = transport.receive(1)
    results.put(("sent", transport.bytes_sent, answer.item["took"]))


def receive_many(transport: Transport, results: Any) -> None:
    good = 0
    most = 0
    for number in range(COUNT):
        most = max(most, transport.queued())
        message = transport.receive(0)
        image, extra = message.payload
        wanted, wanted_extra = payload(number)
        good += (
            message.item == {"sequence": number}
            and message.micro_batch == number % 3
            and torch.equal(image, wanted)
            and image.stride() == wanted.stride()
            and torch.equal(extra["labels"], wanted_extra["labels"])
            and extra["none"].shape == (0,)
        )
    transport.post(0, Message({"took": good}))
    results.put(("received", transport.bytes_received, most))
    transport.wait_for_room(0)
    transport_idle(transport)


def transport_idle(transport: Transport) -> None:
    """Take nothing for a while: wait for a stage that does not exist."""
    threading.Timer(1.0, transport.abort, [Aborted("enough")]).start()
    with pytest.raises((PeerLost, Aborted)):
        transport.receive(99)


def test_messages_arrive_in_order_with_values_and_strides_and_within_the_credit(pair: Pair) -> None:
    pair.run(send_many, receive_many)
    results = dict[str, tuple[int, int]]()
    for _ in range(2):
        name, count, value = pair.result()
        results[name] = (count, value)
    assert results["sent"][1] == COUNT
    assert results["received"][1] <= 2
    assert (
        results["sent"][0]
        == results["received"][0]
        == sum(image.nbytes + extra["labels"].nbytes for image, extra in map(payload, range(COUNT)))
    )


def overfill(transport: Transport, results: Any) -> None:
    for number in range(2):
        transport.wait_for_room(1)
        transport.post(1, Message({"sequence": number}))
    waiter = threading.Timer(0.5, transport.abort, [Aborted("the test is over")])
    waiter.start()
    try:
        transport.wait_for_room(1)
    except Aborted as error:
        results.put(str(error))


def test_a_full_lane_holds_the_sender_until_it_is_aborted(pair: Pair) -> None:
    pair.run(overfill, take_nothing_until_told)
    assert pair.result() == "the test is over"


def take_nothing_until_told(transport: Transport, results: Any) -> None:
    transport_idle(transport)


def die(transport: Transport, results: Any) -> None:
    transport.receive(0)
    os._exit(9)


def outlive(transport: Transport, results: Any) -> None:
    try:
        for number in range(100):
            transport.wait_for_room(1)
            transport.post(1, Message({"sequence": number}, 0, torch.ones(1000)))
    except PeerLost as error:
        results.put(error.peer)


def test_a_dead_neighbour_is_named_and_not_waited_for(pair: Pair) -> None:
    pair.run(outlive, die)
    assert pair.result() == 1


def test_an_abort_ends_a_wait_from_another_thread() -> None:
    transport = RpcTransport(0, 1, "generation", 2, CPU)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wait() -> None:
        try:
            transport.receive(1)
        except Aborted as error:
            ended.put(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    transport.abort(Aborted("stop"))
    thread.join(10)
    assert ended.get_nowait() == "stop"


def test_numbers_restore_the_order_of_calls_that_overtake_each_other() -> None:
    transport = RpcTransport(1, 2, "generation", 4, CPU)
    for number in (2, 0, 3, 1):  # as RPC's threads may deliver them
        transport.accept(0, number, Message({"sequence": number}))
    assert [transport.receive(0).item["sequence"] for _ in range(4)] == [0, 1, 2, 3]
