"""The files for containers, judged by Docker Compose itself and by hadolint; neither needs an engine.

Compose reports what it has understood after merging, defaults and profiles: the assertions are about that.
"""

from __future__ import annotations

import re
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from scpl_dist.run import config as configuration
from tests.support.compose import COMPOSE, PROCESSES, STAGES, compose, model
from tests.support.programs import ROOT, Program, find, run

GPU = ROOT / "docker-compose.gpu.yml"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
MONITORING = ("prometheus", "grafana")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return model(COMPOSE)


def test_services_are_there_and_monitoring_is_a_profile(cluster: dict[str, Any]) -> None:
    assert set(cluster["services"]) == {*PROCESSES, *MONITORING}
    without_profile = compose("-f", COMPOSE, "config", "--services").stdout.split()
    assert set(without_profile) == set(PROCESSES)
    assert "version" not in yaml.safe_load(COMPOSE.read_text())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stop_grace_period: 90s", "stop_grace_periode: 90s"),
        ("condition: service_healthy", "condition: service_healty"),
        ("internal: true", "internal: maybe"),
        ("source: worker_key\n", "source: worker_keys\n"),
        ("networks: [stages]", "networks: [stage]"),
        ("- runs:/srv", "- run:/srv"),
    ],
)
def test_compose_notices_a_mistake(old: str, new: str, tmp_path: Path) -> None:
    text = COMPOSE.read_text()
    assert old in text
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace(old, new))
    assert compose("-f", broken, "--profile", "*", "config").returncode != 0


def test_only_metrics_and_monitoring_are_published_and_only_on_loopback(cluster: dict[str, Any]) -> None:
    published = {
        name: [(port["host_ip"], port["target"]) for port in service.get("ports", [])]
        for name, service in cluster["services"].items()
    }
    loopback = "127.0.0.1"
    assert published == {
        "coordinator": [(loopback, 9400)],
        "prometheus": [(loopback, 9090)],
        "grafana": [(loopback, 3000)],
        **{name: [] for name in STAGES},
    }
    for service in cluster["services"].values():
        assert "network_mode" not in service
        assert not service.get("privileged")


def test_tensors_and_control_are_on_a_network_without_a_way_out(cluster: dict[str, Any]) -> None:
    assert cluster["networks"]["stages"]["internal"] is True
    assert cluster["networks"]["stages"]["driver_opts"] == {
        "com.docker.network.bridge.gateway_mode_ipv4": "isolated"
    }
    assert not cluster["networks"]["monitoring"].get("internal")
    members = {name: set(service["networks"]) for name, service in cluster["services"].items()}
    assert members == {
        "coordinator": {"stages", "monitoring"},
        **{name: {"stages"} for name in STAGES},
        **{name: {"monitoring"} for name in MONITORING},
    }


@pytest.mark.parametrize("name", PROCESSES)
def test_process_of_the_run_stops_in_order_and_has_few_rights(cluster: dict[str, Any], name: str) -> None:
    service = cluster["services"][name]
    assert service["init"] is True
    assert service["restart"] == ("no" if name == "coordinator" else "on-failure:5")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["shm_size"]) >= 2**30
    assert service["stop_grace_period"] == "1m30s"
    assert {volume["source"]: volume["target"] for volume in service["volumes"]} == {"runs": "/srv/scpl/runs"}


def test_nobody_starts_before_what_it_needs_is_healthy(cluster: dict[str, Any]) -> None:
    waits = {
        name: set(service.get("depends_on", {}))
        for name, service in cluster["services"].items()
        if service.get("depends_on")
    }
    assert waits == {
        "stage-0": {"coordinator"},
        "stage-1": {"coordinator"},
        "stage-2": {"coordinator"},
        "grafana": {"prometheus"},
    }
    for service in cluster["services"].values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert cluster["services"][needed]["healthcheck"]["test"]


def secrets_of(cluster: dict[str, Any], name: str) -> set[str]:
    return {secret["target"] for secret in cluster["services"][name].get("secrets", [])}


def test_each_process_has_its_own_secret_key_and_the_public_key_of_the_other_end(
    cluster: dict[str, Any],
) -> None:
    assert secrets_of(cluster, "coordinator") == {"coordinator.key_secret", "worker.key"}
    for name in STAGES:
        assert secrets_of(cluster, name) == {"worker.key_secret", "coordinator.key"}
    for name in MONITORING:
        assert secrets_of(cluster, name) == set()
    for service in cluster["services"].values():
        for secret in service.get("secrets", []):
            assert cluster["secrets"][secret["source"]]["file"].endswith(f"/keys/{secret['target']}")


def test_stage_has_its_rank_as_torchrun_would_give_it(cluster: dict[str, Any]) -> None:
    for rank, name in enumerate(STAGES):
        service = cluster["services"][name]
        assert service["command"][0] == "worker"
        assert "--no-coordinator" in service["command"]
        assert service["hostname"] == name
        environment = service["environment"]
        assert environment["RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == str(len(STAGES))


def test_cluster_configuration_fits_the_services(cluster: dict[str, Any]) -> None:
    path = Path(cluster["configs"]["cluster"]["file"])
    settings = configuration.load(path)
    networks = cluster["services"]["coordinator"]["networks"]
    assert settings.pipeline.stages == len(STAGES)
    assert networks["stages"]["aliases"] == [settings.control.host]
    assert networks["monitoring"]["aliases"] == [settings.metrics.host]
    assert cluster["services"]["coordinator"]["ports"][0]["target"] == settings.metrics.port
    assert settings.control.port != 0
    assert settings.control.keys == "/run/secrets"
    [target] = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"][0][
        "static_configs"
    ][0]["targets"]
    assert target == f"{settings.metrics.host}:{settings.metrics.port}"
    for name in PROCESSES:
        service = cluster["services"][name]
        assert service["configs"] == [{"source": "cluster", "target": "/etc/scpl/cluster.toml"}]
        assert "/etc/scpl/cluster.toml" in service["command"]
        assert "--run-dir=runs/cluster" in service["command"]


def test_every_bind_mount_and_file_exists(cluster: dict[str, Any]) -> None:
    sources = [
        volume["source"]
        for service in cluster["services"].values()
        for volume in service["volumes"]
        if volume["type"] == "bind"
    ]
    sources += [item["file"] for item in cluster["configs"].values()]
    assert len(sources) == 4
    assert all(Path(source).exists() for source in sources)
    # The provider and the home page look for the dashboard where Compose puts it.
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/scpl.yml").read_text())
    targets = [volume["target"] for volume in cluster["services"]["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in targets
    home = cluster["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "docker/grafana/dashboards" / Path(home).name).exists()


def test_images_are_pinned(cluster: dict[str, Any]) -> None:
    for name in MONITORING:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", cluster["services"][name]["image"])
    assert {cluster["services"][name]["image"] for name in PROCESSES} == {"scpl_dist:local"}
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(bases) == {"python:${PYTHON}-slim-bookworm"}
    assert re.search(r"^ARG PYTHON=3\.\d+$", DOCKERFILE, re.MULTILINE)


def test_image_is_built_once_and_never_looked_for_elsewhere(cluster: dict[str, Any]) -> None:
    services = cluster["services"]
    assert [name for name in services if "build" in services[name]] == ["coordinator"]
    assert {services[name]["pull_policy"] for name in PROCESSES} == {"never"}


def test_variables_reach_the_build_and_the_ports() -> None:
    values = {
        "SCPL_TORCH_INDEX": "https://torch.example/cpu",
        "SCPL_UID": "1234",
        "SCPL_METRICS_PORT": "9500",
    }
    merged = model(COMPOSE, env={**values, "SCPL_RUN": "second", "SCPL_KEYS": "/etc/keys"})
    args = merged["services"]["coordinator"]["build"]["args"]
    assert args == {"TORCH_INDEX": "https://torch.example/cpu", "USER_ID": "1234"}
    assert set(args) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    for name in PROCESSES:
        assert "--run-dir=runs/second" in merged["services"][name]["command"]
    assert merged["services"]["coordinator"]["ports"][0]["published"] == "9500"
    assert merged["secrets"]["worker_key"]["file"] == "/etc/keys/worker.key"


def test_gpu_file_gives_each_stage_a_gpu_and_changes_nothing_else(cluster: dict[str, Any]) -> None:
    merged = model(COMPOSE, GPU, env={"SCPL_GPU_2": "7"})
    numbers = []
    for name, service in merged["services"].items():
        deploy = service.pop("deploy", None)
        if name in STAGES:
            [device] = deploy["resources"]["reservations"]["devices"]
            assert device["capabilities"] == ["gpu"]
            numbers += device["device_ids"]
            service["shm_size"] = cluster["services"][name]["shm_size"]
        else:
            assert deploy is None
    assert numbers == ["0", "1", "7"]
    assert merged["services"] == cluster["services"]


def test_health_check_succeeds_on_an_answer_only(cluster: dict[str, Any]) -> None:
    _, program, option, code = cluster["services"]["coordinator"]["healthcheck"]["test"]
    assert (program, option) == ("python", "-c")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = code.replace("metrics", "127.0.0.1").replace("9400", str(listener.getsockname()[1]))
        for status, expected in ((b"200 OK", 0), (b"503 Service Unavailable", 1)):
            with Program(sys.executable, "-c", code) as check:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1000).startswith(b"GET /healthz ")
                    connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
                    assert check.wait(30) == expected
    run(sys.executable, "-c", code, code=1, limit_s=30)


def test_dockerfile_is_clean_for_hadolint() -> None:
    program = find("hadolint", 'pip install -e ".[test]"')
    done = run(program, "--failure-threshold", "info", ROOT / "docker" / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_image_runs_as_a_user_and_carries_no_keys() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER \$USER_ID$", final, re.MULTILINE)
    assert final.index("\nUSER ") < final.index("\nENTRYPOINT ")
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for word in line.split()
    ]
    assert set(copied) == set(allowed)


def test_pins_of_the_image_satisfy_the_requirements() -> None:
    pins = {}
    for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            [specifier] = pin.specifier
            assert specifier.operator == "=="
            pins[pin.name] = Version(specifier.version)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            assert pins[requirement.name] in requirement.specifier
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    python = re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert python is not None
    assert Version(python[1]) >= Version(project["project"]["requires-python"].removeprefix(">="))
