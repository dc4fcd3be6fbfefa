"""Runs over hosts of their own: torchrun with three of them, keys, strangers, and everything that goes wrong."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.control import keys
from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import called
from tests.support.hosts import Host, cluster
from tests.support.programs import Program, until_nothing
from tests.support.run_folder import losses, rows

pytestmark = pytest.mark.timeout(400)
TIMEOUT_S = 15


def write(path: Path, **values: Any) -> Path:
    """A configuration file for hosts; keys are written as section__key."""
    settings = {"metrics.port": 0, "control.host": "host-a", "runtime.timeout_s": float(TIMEOUT_S)}
    named = {key.replace("__", "."): value for key, value in values.items()}
    if "control.keys" not in named:
        named["control.insecure"] = True
    path.write_text(load(values=settings | named).to_toml())
    return path


def until_it_trains(run: Path, steps: int = 1) -> None:
    """Until the last of so many steps has been recorded."""
    until_nothing(lambda: all(row["step"] < steps - 1 for row in rows(run, "train")) and "no step")


@pytest.fixture(scope="module")
def four() -> Iterator[list[Host]]:
    with cluster(4) as hosts:
        hosts[0].cable(hosts[3], "10.78.0")
        hosts[1].dead_end("10.79.0.2")
        yield hosts


@pytest.fixture
def hosts(four: list[Host]) -> Iterator[list[Host]]:
    """Four hosts on a network, with nothing on them.

    The first and the last have another network between them, and the second has an eth1 that leads to nobody.
    """
    yield four
    for host in four:
        host.reset()


def outcome(program: Program, code: int = 1) -> str:
    """The output of a host's part, which ended with this code and left nothing behind."""
    assert program.wait() == code, program.output
    assert "left behind" not in program.output
    return program.output


def test_three_hosts_equal_one_process_though_one_is_late_and_a_stranger_knocks(
    hosts: list[Host], tmp_path: Path
) -> None:
    first, second, late, outsider = hosts
    keys.create(tmp_path / "keys")
    values = {"run.epochs": 12, "data.batch_size": 128}  # longer than the stranger needs
    run = tmp_path / "run"
    config = write(
        tmp_path / "config.toml",
        **{key.replace(".", "__"): value for key, value in values.items()},
        pipeline__stages=3,
        control__keys=str(tmp_path / "keys"),
        metrics__host="10.78.0.1",
        metrics__port=9400,
    )
    programs = [host.torchrun(3, k, config, "--run-dir", run) for k, host in enumerate((first, second))]
    until_nothing(lambda: {29500} - first.ports())
    programs.append(late.torchrun(3, 2, config, "--run-dir", run))
    until_it_trains(run)
    control = json.loads((run / "run.json").read_text())["control"]
    listening = first.ports()
    places = [control, "http://10.78.0.1:9400/metrics", "10.78.0.1", ",".join(map(str, listening))]
    stranger = outcome(outsider.start(sys.executable, "-m", "tests.support.outsider", *places), code=0)
    outputs = [outcome(program, code=0) for program in programs]

    check_stranger(json.loads(stranger.split("FOUND ")[1]), listening)
    assert (
        "turned away a connection from 10.77.0.4: its key is not in the folder control.keys" not in outputs[1]
    )
    warnings = [row["text"] for row in rows(run, "warning")]
    assert any("turned away a connection from 10.77.0.4" in text for text in warnings)
    secret = (tmp_path / "keys" / "worker.key_secret").read_text().split('secret-key = "')[1].split('"')[0]
    assert all(
        secret not in path.read_text() for path in run.rglob("*") if path.suffix in (".json", ".toml", ".log")
    )

    expected = reference.train(load(values=values))
    assert losses(run) == expected.losses
    called("export", run, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    for name, tensor in reference.tensors(expected.trainables).items():
        assert torch.equal(exported[name], tensor), name


def check_stranger(found: dict[str, Any], listening: set[int]) -> None:
    assert found["no key"].startswith("HANDSHAKE_FAILED")
    assert found["wrong key"].startswith("HANDSHAKE_FAILED")
    assert found["garbage"] == "closed"
    assert found["huge frame"] == "closed"
    assert found["rejected"]["handshake"] >= 4
    # Torch's store listens on all addresses of the first host, whatever it is told; all else keeps to its interface.
    assert {4711, 9400, 29500} < listening
    assert set(found["ports"]) == {9400, 29500}


def test_a_host_that_never_comes_ends_the_others(hosts: list[Host], tmp_path: Path) -> None:
    config = write(tmp_path / "config.toml", pipeline__stages=3)
    programs = [
        host.torchrun(3, k, config, "--run-dir", tmp_path / "run", conf="timeout=20")
        for k, host in enumerate(hosts[:2])
    ]
    assert "2/3 clients joined" in outcome(programs[0])
    outcome(programs[1])


def test_a_link_that_goes_down_ends_all_hosts_and_names_the_stage(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", run__epochs=10000)
    programs = [host.torchrun(2, k, config, "--run-dir", run) for k, host in enumerate(hosts[:2])]
    until_it_trains(run)
    hosts[1].unplug()
    there = outcome(programs[1])
    assert f"the coordinator at tcp://host-a:4711 has been silent for {TIMEOUT_S} s" in there
    here = outcome(programs[0])
    assert "stage 1" in here
    assert "host-b" in here
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["stage"], ended["host"]) == (1, 1, "host-b")


def test_a_link_that_comes_back_in_time_has_lost_nothing(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"run.epochs": 5, "data.batch_size": 128}
    config = write(tmp_path / "config.toml", run__epochs=5, data__batch_size=128, runtime__timeout_s=60.0)
    programs = [host.torchrun(2, k, config, "--run-dir", run) for k, host in enumerate(hosts[:2])]
    until_it_trains(run)
    hosts[1].unplug()
    time.sleep(7.5)  # the time that it is away; TCP may try again only after twice as long
    hosts[1].plug_in()
    for program in programs:
        outcome(program, code=0)
    assert losses(run) == reference.train(load(values=values)).losses


def test_replicas_on_hosts_of_their_own_share_a_stage_until_one_is_cut_off(
    hosts: list[Host], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = {"run.epochs": 1, "data.batch_size": 128}
    config = write(
        tmp_path / "config.toml",
        run__epochs=10000,
        data__batch_size=128,
        pipeline__stages=2,
        pipeline__replicas=[1, 2],
    )
    programs = [host.torchrun(3, k, config, "--run-dir", run) for k, host in enumerate(hosts[:3])]
    until_it_trains(run, steps=4)
    hosts[2].unplug()
    here = outcome(programs[0])
    for program in programs[1:]:
        outcome(program)
    assert "stage 1.1" in here
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["stage"], ended["replica"], ended["host"]) == (1, 1, 1, "host-c")
    found = losses(run)
    expected = reference.train(load(values=values)).losses
    for block in range(4):
        assert found[0, block] == pytest.approx(expected[0, block], rel=1e-5)


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("eth9", "runtime.interface = 'eth9': not an interface of host-b with an IPv4 address; it has lo"),
        (
            "eth1",
            "stage 1 on host-b (10.79.0.2) cannot be reached from stage 0 on host-a (10.77.0.1, interface eth0)",
        ),
    ],
)
def test_a_wrong_interface_is_named(interface: str, message: str, hosts: list[Host], tmp_path: Path) -> None:
    config = write(tmp_path / "config.toml")
    options = [[], ["-o", f"runtime.interface={interface}"]]
    programs = [
        host.torchrun(2, k, config, *options[k], "--run-dir", tmp_path / "run")
        for k, host in enumerate(hosts[:2])
    ]
    outcome(programs[1])
    assert message in outcome(programs[0])


def test_a_folder_that_is_not_shared_is_named(hosts: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = write(tmp_path / "config.toml")
    programs = [
        hosts[0].torchrun(2, 0, config, "--run-dir", run),
        hosts[1].torchrun(2, 1, config, "--run-dir", run, hide=run),
    ]
    outcome(programs[1])
    assert f"the run folder {run} on host-b is not the coordinator's" in outcome(programs[0])
