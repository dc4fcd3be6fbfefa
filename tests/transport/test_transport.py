"""The transport between real processes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

from scpl_dist.run.errors import Aborted, PeerLost, SetupError
from scpl_dist.transport import Envelope, Store, Transport, rendezvous
from scpl_dist.transport.c10d import C10dTransport
from scpl_dist.transport.parcel import pack, unpack
from scpl_dist.transport.quantization import dequantize, quantize
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.transport.select import choose
from scpl_dist.transport.tensors import narrow, nbytes, widen
from tests.support.programs import until_nothing

CPU = torch.device("cpu")
Body = Callable[[Transport, "mp.SimpleQueue[Any]"], None]


def alone(rank: int, world: int, max_in_flight: int = 2) -> RpcTransport:
    return RpcTransport(
        rank=rank, world=world, max_in_flight=max_in_flight, device=CPU, generation="generation"
    )


def connected(kind: str, rank: int, store: Store) -> Transport:
    transport: Transport
    if kind == "rpc":
        transport = alone(rank, 2)
    else:
        transport = C10dTransport(
            rank=rank, world=2, max_in_flight=2, device=CPU, backend="gloo", links=[(0, 1)]
        )
    transport.connect(store)
    return transport


def start(rank: int, file: str, kind: str, body: Body, results: Any) -> None:
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    transport = connected(kind, rank, FileStore(file, 2))
    body(transport, results)
    transport.close()
    results.close()
    results.join_thread()  # os._exit would cut off what the queue's thread has not sent yet
    os._exit(0)


class Pair:
    """Two processes, each with one end of a transport."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.file = str(folder / "store")
        self.context = mp.get_context("spawn")
        self.results = self.context.Queue()
        self.processes: list[Any] = []

    def run(self, first: Body, second: Body) -> None:
        for rank, body in enumerate((first, second)):
            process = self.context.Process(
                target=start, args=(rank, self.file, self.kind, body, self.results)
            )
            process.start()
            self.processes.append(process)

    def result(self) -> Any:
        return self.results.get(timeout=120)


@pytest.fixture(params=["rpc", "gloo"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with closed(Pair(request.param, tmp_path)) as made:
        yield made


@contextmanager
def closed(made: Pair) -> Iterator[Pair]:
    yield made
    for process in made.processes:
        process.join(60)
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
        transport.post(1, Envelope({"sequence": number}, number % 3, payload(number)))
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
    transport.post(0, Envelope({"took": good}))
    results.put(("received", transport.bytes_received, most))
    transport.wait_for_room(0)
    transport_idle(transport)


def transport_idle(transport: Transport, seconds: float = 1.0) -> None:
    """Take nothing for a while: wait for a stage that does not exist."""
    threading.Timer(seconds, transport.abort, [Aborted("enough")]).start()
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
    expected = [narrow(payload(number), torch.float32)[0] for number in range(COUNT)]
    assert results["sent"][0] == results["received"][0] == sum(map(nbytes, expected))


def overfill(transport: Transport, results: Any) -> None:
    for number in range(2):
        transport.wait_for_room(1)
        transport.post(1, Envelope({"sequence": number}))
    waiter = threading.Timer(0.5, transport.abort, [Aborted("the test is over")])
    waiter.start()
    try:
        transport.wait_for_room(1)
    except Aborted as error:
        results.put(str(error))


def test_a_full_lane_holds_the_sender_until_it_is_aborted(pair: Pair) -> None:
    pair.run(overfill, take_nothing)
    assert pair.result() == "the test is over"


def take_nothing(transport: Transport, results: Any) -> None:
    transport_idle(transport, 6.0)  # longer than the other one waits, even if that one begins seconds later


def die(transport: Transport, results: Any) -> None:
    transport.receive(0)
    os._exit(9)


def outlive(transport: Transport, results: Any) -> None:
    try:
        for number in range(100):
            transport.wait_for_room(1)
            transport.post(1, Envelope({"sequence": number}, 0, torch.ones(1000)))
    except PeerLost as error:
        results.put(error.peer)


def test_a_dead_neighbour_is_named_and_not_waited_for(pair: Pair) -> None:
    pair.run(outlive, die)
    assert pair.result() == 1


def send_when_asked(transport: Transport, results: Any) -> None:
    transport.receive(1)
    transport.post(1, Envelope({}, 0, torch.ones(1000)))
    with suppress(PeerLost, Aborted):
        transport.receive(1)


def have_no_memory(transport: Transport, results: Any) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("not a byte is left")

    transport.arrive = fail  # type: ignore[method-assign, assignment]
    transport.post(0, Envelope({}))
    try:
        transport.receive(0)
    except torch.OutOfMemoryError as error:
        results.put(str(error))


def test_who_has_no_memory_for_a_message_does_not_take_its_sender_for_dead(pair: Pair) -> None:
    pair.run(send_when_asked, have_no_memory)
    assert pair.result() == "not a byte is left"


def test_what_comes_after_the_end_is_not_taken() -> None:
    transport = alone(1, 2)
    transport.abort(Aborted("stop"))
    # What a receive that was ended has left.
    transport.arrive(0, 0, Envelope({}, 0, torch.empty(3)), lambda: None)
    with pytest.raises(Aborted, match="stop"):
        transport.receive(0)


def leave(transport: Transport, results: Any) -> None:
    other = 1 - transport.rank
    with suppress(PeerLost):  # the other one may leave first
        for number in range(10):  # more than may be on its way
            transport.wait_for_room(other)
            transport.post(other, Envelope({"sequence": number}, 0, torch.ones(1000)))
            transport.receive(other)
        # Large ones that nobody takes: the other one leaves in the middle of them.
        while transport.rank:
            transport.wait_for_room(other)
            transport.post(other, Envelope({}, 0, torch.ones(1 << 22)))
    transport.close()
    rendezvous.leave()
    until_nothing(lambda: [one.name for one in threading.enumerate() if " " in one.name], limit_s=30)
    results.put("nothing left")


def test_a_worker_that_leaves_keeps_no_thread(tmp_path: Path) -> None:
    with closed(Pair("gloo", tmp_path)) as pair:
        pair.run(leave, leave)
        assert [pair.result() for _ in range(2)] == 2 * ["nothing left"]


def test_an_abort_ends_a_wait_from_another_thread() -> None:
    transport = alone(0, 1)
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
    transport = alone(1, 2, 4)
    for number in (2, 0, 3, 1):  # as RPC's threads may deliver them
        transport.arrive(0, number, Envelope({"sequence": number}), lambda: None)
    assert [transport.receive(0).item["sequence"] for _ in range(4)] == [0, 1, 2, 3]


def strided() -> list[torch.Tensor]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    return [
        base,
        base.transpose(0, 2),
        base.permute(1, 2, 0),
        base[:, 1],  # has gaps
        base[:1].expand(5, 3, 4),  # overlaps
        torch.empty(0, 3),
        torch.tensor(7),
        torch.tensor([True, False]),
        base.to(torch.bfloat16).t() if base.dim() == 2 else base.to(torch.bfloat16),
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]


@pytest.mark.parametrize("number", range(len(strided())))
def test_a_parcel_keeps_values_dtype_and_strides_of_dense_tensors(number: int) -> None:
    tensor = strided()[number]
    header, sent = pack(Envelope({"kind": "train"}, 3, {"a": [tensor, None], "b": (tensor,)}, 1 / 3))
    message, arrived = unpack(header, CPU)
    for target, source in zip(arrived, sent, strict=True):
        target.copy_(source)
    assert (message.item, message.micro_batch, message.weight) == ({"kind": "train"}, 3, 1 / 3)
    assert message.payload["a"][1] is None
    for copy in (message.payload["a"][0], message.payload["b"][0]):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        dense = tensor.clone(memory_format=torch.preserve_format)
        assert copy.stride() == (tensor.stride() if dense.stride() == tensor.stride() else dense.stride())


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match="a block gives a set, which cannot travel"):
        pack(Envelope({}, 0, {1, 2}))


def test_codes_travel_with_their_scales_behind_the_tree_and_become_what_they_were() -> None:
    images = torch.randn(4, 64, 8, 8).to(memory_format=torch.channels_last)
    halves, nothing = torch.randn(4, 60, 64, dtype=torch.bfloat16), torch.empty(0, 3)
    payload = ({"a": images, "b": torch.arange(4)}, [halves, nothing, torch.ones(1, dtype=torch.float64)])
    sent, wide = narrow(payload, torch.int8)
    header, source = pack(Envelope({}, 0, sent, wide=wide))
    message, arrived = unpack(header, CPU)
    for target, one in zip(arrived, source, strict=True):
        target.copy_(one)
    scales = 4 * 64 + 4 * 60
    assert sum(one.nbytes for one in source) == images.numel() + halves.numel() + 4 * scales + 4 + 8
    (named, others) = widen(message.payload, message.wide)
    assert torch.equal(named["b"], payload[0]["b"])
    assert torch.equal(others[2], payload[1][2])
    assert others[1].shape == (0, 3)
    for own, back in ((images, named["a"]), (halves, others[0])):
        assert (back.dtype, back.stride()) == (own.dtype, own.stride())
        torch.testing.assert_close(back, dequantize(*quantize(own), own.dtype), rtol=0, atol=0)


def test_narrow_takes_bits_from_float32_only_and_widen_gives_the_type_back() -> None:
    third = torch.tensor([1 / 3])
    payload = (third, torch.tensor([1 << 40]), third.double())
    sent, wide = narrow(payload, torch.bfloat16)
    assert [tensor.dtype for tensor in sent] == [torch.bfloat16, torch.int64, torch.float64]
    back = widen(sent, wide)
    assert back[0].dtype is torch.float32
    assert back[0].item() == third.bfloat16().item() != third.item()
    assert torch.equal(back[1], payload[1])
    assert narrow(payload, torch.float32) == (payload, [])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], torch.uint8),
        ([0, 256], torch.int16),
        ([-1, 7], torch.int16),
        ([-(1 << 15) - 1], torch.int32),
        ([1 << 31], torch.int64),
        ([], torch.int64),
    ],
)
def test_integers_travel_in_the_smallest_type_and_lose_nothing(values: list[int], dtype: torch.dtype) -> None:
    labels = torch.tensor(values, dtype=torch.int64)
    sent, wide = narrow({"labels": labels}, torch.float32)
    assert sent["labels"].dtype is dtype
    back = widen(sent, wide)["labels"]
    assert back.dtype is torch.int64
    assert torch.equal(back, labels)


@pytest.mark.parametrize(
    ("wanted", "places", "chosen"),
    [
        ("auto", [("cpu", ""), ("cpu", "")], "rpc"),
        ("auto", [("cuda:0", "x"), ("cpu", "")], "rpc"),
        ("auto", [("cuda:0", "x"), ("cuda:0", "x")], "rpc"),  # of two containers, perhaps
        ("auto", [("cuda:0", "x"), ("cuda:0", "y")], "nccl"),  # each is shown one of a host's
        ("gloo", [("cuda:0", "x"), ("cuda:1", "y")], "gloo"),
        ("rpc", [("cuda:0", "x"), ("cuda:1", "y")], "rpc"),
        ("nccl", [("cpu", ""), ("cuda:0", "x")], "not every worker is on a GPU"),
        ("nccl", [("cuda:0", "x"), ("cuda:0", "x")], "some workers share a GPU"),
    ],
)
def test_all_stages_choose_the_same_transport(
    wanted: str, places: list[tuple[str, str]], chosen: str
) -> None:
    endpoints = [{"device": device, "gpu": gpu} for device, gpu in places]
    if " " in chosen:
        with pytest.raises(SetupError, match=chosen):
            choose(wanted, endpoints)
    else:
        assert choose(wanted, endpoints) == chosen
