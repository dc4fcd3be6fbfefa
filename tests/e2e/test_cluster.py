"""Runs over hosts of their own: torchrun with three of them, keys, strangers, and everything that goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.control import keys
from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import scpl_dist
from tests.support.hosts import Host, cluster, finish
from tests.support.programs import until_nothing

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


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def two() -> Iterator[list[Host]]:
    with cluster(2) as hosts:
        yield hosts


def outcome(process: subprocess.Popen[str], code: int = 1) -> str:
    """The output of a host's part, which ended with this code and left nothing behind."""
    ended, output = finish(process)
    assert ended == code, f"exit code {ended} instead of {code}\n{output}"
    assert "left behind" not in output
    return output


def test_three_hosts_equal_one_process_though_one_is_late_and_a_stranger_knocks(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys")
    values = {"run.epochs": 3, "data.batch_size": 128}
    run = tmp_path / "run"
    with cluster(4) as (first, second, late, outsider):
        first.cable(outsider, "10.78.0")
        config = write(
            tmp_path / "config.toml",
            **{key.replace(".", "__"): value for key, value in values.items()},
            pipeline__stages=3,
            control__keys=str(tmp_path / "keys"),
            metrics__host="10.78.0.1",
            metrics__port=9400,
        )
        processes = [host.torchrun(3, k, config, "--run-dir", run) for k, host in enumerate((first, second))]
        until_nothing(lambda: {29500} - first.ports())
        processes.append(late.torchrun(3, 2, config, "--run-dir", run))
        until_nothing(lambda: not any(row["event"] == "train" for row in rows(run)) and "no step")
        control = json.loads((run / "run.json").read_text())["control"]
        listening = first.ports()
        places = [control, "http://10.78.0.1:9400/metrics", "10.78.0.1", ",".join(map(str, listening))]
        stranger = outcome(outsider.start(sys.executable, "-m", "tests.support.outsider", *places), code=0)
        outputs = [outcome(process, code=0) for process in processes]

    check_stranger(json.loads(stranger.split("FOUND ")[1]), listening)
    assert (
        "turned away a connection from 10.77.0.4: its key is not in the folder control.keys" not in outputs[1]
    )
    warnings = [row["text"] for row in rows(run) if row["event"] == "warning"]
    assert any("turned away a connection from 10.77.0.4" in text for text in warnings)
    secret = (tmp_path / "keys" / "worker.key_secret").read_text().split('secret-key = "')[1].split('"')[0]
    assert all(
        secret not in path.read_text() for path in run.rglob("*") if path.suffix in (".json", ".toml", ".log")
    )

    expected = reference.train(load(values=values))
    losses = {(row["step"], row["block"]): row["terms"] for row in rows(run) if row["event"] == "train"}
    assert losses == expected.losses
    scpl_dist("export", run, tmp_path / "out.safetensors")
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


def test_a_host_that_never_comes_ends_the_others(two: list[Host], tmp_path: Path) -> None:
    config = write(tmp_path / "config.toml", pipeline__stages=3)
    processes = [
        host.torchrun(3, k, config, "--run-dir", tmp_path / "run", conf="timeout=5")
        for k, host in enumerate(two)
    ]
    assert "2/3 clients joined" in outcome(processes[0])
    outcome(processes[1])


def test_a_link_that_goes_down_ends_all_hosts_and_names_the_stage(two: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "config.toml", run__epochs=10000)
    processes = [host.torchrun(2, k, config, "--run-dir", run) for k, host in enumerate(two)]
    until_nothing(lambda: not any(row["event"] == "train" for row in rows(run)) and "no step")
    two[1].unplug()
    there = outcome(processes[1])
    assert "the connection to the coordinator at tcp://host-a:4711 broke" in there
    here = outcome(processes[0])
    assert "stage 1" in here
    assert "host-b" in here
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["stage"], ended["host"]) == (1, 1, "host-b")


def test_replicas_on_hosts_of_their_own_share_a_stage_until_one_is_cut_off(tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"run.epochs": 1, "data.batch_size": 128}
    with cluster(3) as hosts:
        config = write(
            tmp_path / "config.toml",
            run__epochs=10000,
            data__batch_size=128,
            pipeline__stages=2,
            pipeline__replicas=[1, 2],
        )
        processes = [host.torchrun(3, k, config, "--run-dir", run) for k, host in enumerate(hosts)]
        until_nothing(
            lambda: not any(row["event"] == "train" and row["step"] > 2 for row in rows(run)) and "no step"
        )
        hosts[2].unplug()
        here = outcome(processes[0])
        for process in processes[1:]:
            outcome(process)
    assert "stage 1 replica 1" in here
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["stage"], ended["replica"], ended["host"]) == (1, 1, 1, "host-c")
    losses = {(row["step"], row["block"]): row["terms"] for row in rows(run) if row["event"] == "train"}
    expected = reference.train(load(values=values)).losses
    for block in range(4):
        assert losses[0, block] == pytest.approx(expected[0, block], rel=1e-5)


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("eth9", "runtime.interface = 'eth9': not an interface of host-b with an IPv4 address; it has lo"),
        ("lo", "runtime.interface = 'lo': this interface reaches host-b only"),
        (
            "eth1",
            "stage 1 on host-b (10.79.0.2) cannot be reached from stage 0 on host-a (10.77.0.1, interface eth0)",
        ),
    ],
)
def test_a_wrong_interface_is_named(interface: str, message: str, two: list[Host], tmp_path: Path) -> None:
    if interface == "eth1":  # a network that host-a is not on
        two[1].dead_end("10.79.0.2")
    config = write(tmp_path / "config.toml")
    options = [[], ["-o", f"runtime.interface={interface}"]]
    processes = [
        host.torchrun(2, k, config, *options[k], "--run-dir", tmp_path / "run") for k, host in enumerate(two)
    ]
    outcome(processes[1])
    assert message in outcome(processes[0])


def test_a_folder_that_is_not_shared_is_named(two: list[Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = write(tmp_path / "config.toml")
    processes = [
        two[0].torchrun(2, 0, config, "--run-dir", run),
        two[1].torchrun(2, 1, config, "--run-dir", run, hide=run),
    ]
    outcome(processes[1])
    assert f"the run folder {run} on host-b is not the coordinator's" in outcome(processes[0])
