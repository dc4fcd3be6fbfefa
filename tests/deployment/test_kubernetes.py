"""The manifests of launch/kubernetes, judged by Kubernetes' own schemas, and their commands, run here.

What refers to what, no schema knows: names, numbers and ports of the manifests are compared with each other here.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from scpl_dist.run.config import load
from tests.support.command import called
from tests.support.ports import free_port
from tests.support.programs import ROOT, Program, run
from tests.support.run_folder import accuracies

FOLDER = ROOT / "launch" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
APART = {"storage.yaml", "servicemonitor.yaml"}  # one outlives a run, the other needs the Prometheus Operator
VERSIONS = "1.31", "1.34", "1.37"  # 1.31 is the first in which a Job's podFailurePolicy is stable
MANIFESTS: dict[tuple[str, str], dict[str, Any]] = {
    (manifest["kind"], manifest["metadata"]["name"]): manifest
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for manifest in yaml.safe_load_all(path.read_text())
}
CONFIG = load(FOLDER / "cluster.toml")
JOBS = {name: MANIFESTS["Job", name] for name in ("scpl-coordinator", "scpl-stages")}
PODS = {name: job["spec"]["template"]["spec"] for name, job in JOBS.items()}


def container(name: str) -> dict[str, Any]:
    [found] = PODS[name]["containers"]
    return dict(found)


def test_every_file_is_applied_or_named_as_one_that_is_not() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*KUSTOMIZATION["resources"]} | APART == files
    assert KUSTOMIZATION["configMapGenerator"] == [{"name": "scpl-config", "files": ["cluster.toml"]}]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("kind", "name"), [key for key in MANIFESTS if key[0] != "ServiceMonitor"])
def test_a_manifest_is_what_kubernetes_takes(kind: str, name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[kind, name], version, strict=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("completionMode: Indexed", "completionModus: Indexed"),
        ("backoffLimit: 30", "backoffLimit: many"),
        ("fieldPath", "fieldpath"),
    ],
)
def test_the_schemas_notice_a_mistake(old: str, new: str) -> None:
    text = (FOLDER / "stages.yaml").read_text()
    assert old in text
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(yaml.safe_load(text.replace(old, new)), VERSIONS[0], strict=True)


def test_there_is_a_pod_for_each_worker_and_its_index_is_its_rank() -> None:
    stages, world = JOBS["scpl-stages"]["spec"], CONFIG.layout.world
    assert (stages["completionMode"], stages["completions"], stages["parallelism"]) == (
        "Indexed",
        world,
        world,
    )
    variables = {entry["name"]: entry for entry in container("scpl-stages")["env"]}
    assert variables["WORLD_SIZE"]["value"] == str(world)
    assert variables["LOCAL_WORLD_SIZE"]["value"] == "1"
    assert variables["RANK"]["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )


def test_workers_and_prometheus_find_the_coordinator() -> None:
    service = MANIFESTS["Service", CONFIG.control.host]["spec"]
    labels = JOBS["scpl-coordinator"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels
    assert service["selector"] != JOBS["scpl-stages"]["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["port"] for port in service["ports"]}
    assert ports == {"control": CONFIG.control.port, "metrics": CONFIG.metrics.port}
    inside = {port["name"]: port["containerPort"] for port in container("scpl-coordinator")["ports"]}
    assert inside == ports
    monitor = MANIFESTS["ServiceMonitor", "scpl"]["spec"]
    assert (
        monitor["selector"]["matchLabels"].items()
        <= MANIFESTS["Service", CONFIG.control.host]["metadata"]["labels"].items()
    )
    assert [endpoint["port"] for endpoint in monitor["endpoints"]] == ["metrics"]


def test_only_the_metrics_are_open_to_other_pods() -> None:
    policy = MANIFESTS["NetworkPolicy", "scpl"]["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    for job in JOBS.values():
        assert chosen.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    own, others = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": chosen}}]}
    assert others["ports"] == [{"port": CONFIG.metrics.port}]


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_has_few_rights_and_time_for_its_last_checkpoint(name: str) -> None:
    pod = PODS[name]
    context = pod["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["fsGroup"] == 1000  # of the Dockerfile
    assert pod["shareProcessNamespace"]
    assert pod["terminationGracePeriodSeconds"] >= 90
    assert not pod["automountServiceAccountToken"]
    for each in (*pod["initContainers"], *pod["containers"]):
        assert each["image"].partition(":")[0] == KUSTOMIZATION["images"][0]["name"]
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", JOBS)
def test_every_volume_is_there_and_used(name: str) -> None:
    pod = PODS[name]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    used = [mount for each in (*pod["initContainers"], *pod["containers"]) for mount in each["volumeMounts"]]
    assert {mount["name"] for mount in used} == volumes.keys()
    assert ("PersistentVolumeClaim", volumes["runs"]["persistentVolumeClaim"]["claimName"]) in MANIFESTS
    assert volumes["config"]["configMap"]["name"] == KUSTOMIZATION["configMapGenerator"][0]["name"]
    places = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert places["keys"] == CONFIG.control.keys
    assert f"{places['config']}/cluster.toml" in pod["containers"][0]["args"]
    assert "secret" not in places  # only what is copied from it


def test_what_failed_comes_again_and_what_was_stopped_does_not() -> None:
    assert PODS["scpl-stages"]["restartPolicy"] == "OnFailure"
    coordinator = JOBS["scpl-coordinator"]["spec"]
    assert "--resume=auto" in container("scpl-coordinator")["args"]
    [final, _] = coordinator["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert final["onExitCodes"]["values"] == [2, 130, 143]
    assert final["onExitCodes"]["containerName"] == container("scpl-coordinator")["name"]


def test_the_documents_make_the_secrets_that_the_pods_mount(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    lines = re.findall(r"kubectl create secret generic (\S+) (.*)", text)
    made = {name: set(re.findall(r"--from-file=keys/(\S+)", files)) for name, files in lines}
    mounted = {
        volume["secret"]["secretName"]
        for pod in PODS.values()
        for volume in pod["volumes"]
        if "secret" in volume
    }
    assert made.keys() == mounted
    assert made["scpl-coordinator-keys"] == {"coordinator.key_secret", "worker.key"}
    assert made["scpl-worker-keys"] == {"worker.key_secret", "coordinator.key"}


def test_the_commands_of_the_pods_train_together(tmp_path: Path) -> None:
    """As processes here: on loopback, with a folder in place of each volume, and nothing else changed."""
    called("keys", "new", tmp_path / "keys")
    port = free_port()
    with contextlib.ExitStack() as stack:
        programs = {}
        for name, rank in (("scpl-coordinator", ""), *(("scpl-stages", str(r)) for r in range(3))):
            place = tmp_path / (name + rank)
            for folder in ("secret", "keys", "config"):
                (place / folder).mkdir(parents=True)
            for key in secret_files(name):
                target = place / "secret" / key
                target.write_bytes((tmp_path / "keys" / key).read_bytes())
                target.chmod(0o440)
            paths = {
                "/run/secret": place / "secret",
                "/run/keys": place / "keys",
                "/etc/scpl": place / "config",
            }
            config = load(
                FOLDER / "cluster.toml",
                values={
                    "control.host": "127.0.0.1",
                    "control.port": port,
                    "control.keys": str(place / "keys"),
                    "metrics.port": 0,
                    "run.epochs": 1,
                },
            )
            (place / "config" / "cluster.toml").write_text(config.to_toml())
            [init] = PODS[name]["initContainers"]
            run(*[replaced(word, paths) for word in init["command"]], code=0)
            values = {"POD_IP": "127.0.0.1", "RANK": rank}
            environment = {e["name"]: e.get("value") or values[e["name"]] for e in container(name)["env"]}
            environment |= {"LOCAL_WORLD_SIZE": "3", "HOME": str(tmp_path)}  # they are on one host here
            words = [
                replaced(word, paths).replace("$(POD_IP)", "127.0.0.1") for word in container(name)["args"]
            ]
            program = Program(sys.executable, "-m", "scpl_dist", *words, cwd=tmp_path, env=environment)
            programs[name + rank] = stack.enter_context(program)
        for name, program in programs.items():
            assert program.wait() == 0, f"{name}: {program.output}"
    assert accuracies(tmp_path / "runs" / "cluster")


def secret_files(name: str) -> tuple[str, str]:
    if name == "scpl-coordinator":
        return "coordinator.key_secret", "worker.key"
    return "worker.key_secret", "coordinator.key"


def replaced(text: str, paths: dict[str, Path]) -> str:
    for old, new in paths.items():
        text = text.replace(old, str(new))
    return text
