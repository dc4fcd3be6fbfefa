"""docker-compose.yml on a real container engine, as a project with an image and names of its own.

Whatever ends the tests, a process that waits for the end of its standard input removes what they have made, by name:
containers, networks, volumes and images. What the engine keeps of a build in its cache stays; it is the engine's.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.compose import COMPOSE, PROCESSES
from tests.support.ports import free_port
from tests.support.programs import ROOT, run, until_nothing
from tests.support.run_folder import Losses, losses

OLDEST = 28
"""Older engines cannot isolate a network from the users of their host."""

# Images by name and not by number: one that somebody else has built from the same files has the same number.
_REMOVE = """
cat
docker ps --all --quiet --filter "name=^$0-" | xargs --no-run-if-empty docker rm --force --volumes
docker compose --file "$1" --project-name "$0" --profile "*" down --volumes --remove-orphans
docker image ls --format "{{.Repository}}:{{.Tag}}" "scpl_dist:$0*" | xargs --no-run-if-empty docker image rm
"""


def need_engine() -> None:
    """Skip the test where no engine answers that can build and start docker-compose.yml, also in CI."""
    if shutil.which("docker") is None:
        pytest.skip(f"needs a container engine, {OLDEST} or later: docker is not installed")
    questions = {
        f"a container engine, {OLDEST} or later": ("version", "--format", "{{.Server.Version}}"),
        "docker buildx, 0.17 or later": ("buildx", "version"),
        "docker compose": ("compose", "version"),
    }
    answers = []
    for what, words in questions.items():
        answer = run("docker", *words)
        if answer.returncode != 0:
            pytest.skip(f"needs {what}: {answer.stderr.strip()}")
        answers.append(answer.stdout.strip())
    if int(answers[0].split(".")[0]) < OLDEST:
        pytest.skip(f"needs a container engine, {OLDEST} or later: this one is {answers[0]}")


class Project:
    """The services of docker-compose.yml. Use it as a context.

    Args:
        folder: of the host, with room for keys; containers write there.
        configuration: takes the place of docker/cluster.toml.

    Attributes:
        name: that of the project, and the beginning of all other names.
        image: name of the image, which `build` makes.
        user: who owns the keys and is the user in the image; never root, also where root runs the tests.
    """

    def __init__(self, folder: Path, configuration: Path) -> None:
        self.name = f"scpl-test-{secrets.token_hex(4)}"
        self.image = f"scpl_dist:{self.name}"
        self.user = os.getuid() or 1000
        self.folder = folder
        self.metrics_port, self.prometheus_port = free_port(), free_port()
        self._variables = {
            "COMPOSE_PROFILES": "",
            "SCPL_CONFIG": str(configuration),
            "SCPL_KEYS": str(folder / "keys"),
            "SCPL_METRICS_PORT": str(self.metrics_port),
            "SCPL_PROMETHEUS_PORT": str(self.prometheus_port),
            "SCPL_TAG": self.name,
            "SCPL_UID": str(self.user),
        }
        # In a session of its own, so that no signal to the tests ends it.
        self._remover = subprocess.Popen(
            ["sh", "-c", _REMOVE, self.name, str(COMPOSE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything.

        Raises:
            AssertionError: something is left; the message has its name.
        """
        assert self._remover.stdin is not None
        self._remover.stdin.close()
        self._remover.wait(120)
        left = [
            *self.docker("ps", "--all", "--format", "{{.Names}}").stdout.split(),
            *self.docker("network", "ls", "--format", "{{.Name}}").stdout.split(),
            *self.docker("volume", "ls", "--format", "{{.Name}}").stdout.split(),
            *self.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").stdout.split(),
        ]
        assert [name for name in left if self.name in name] == []

    def docker(
        self, *words: object, code: int | None = 0, limit_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine's client; `code` is the exit code that it must have, None for any."""
        return run("docker", *words, code=code, limit_s=limit_s)

    def compose(
        self,
        *words: object,
        variables: Mapping[str, str] | None = None,
        code: int | None = 0,
        limit_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Compose on the project; `variables` are set or changed for it."""
        command = ("docker", "compose", "--file", COMPOSE, "--project-name", self.name, *words)
        return run(
            *command, cwd=ROOT, env=self._variables | dict(variables or {}), code=code, limit_s=limit_s
        )

    def build(self, variables: Mapping[str, str] | None = None) -> None:
        """Make the image, from the engine's cache where that has it."""
        self.compose("build", variables=variables, limit_s=900)

    def container(
        self, *words: object, options: Sequence[object] = (), code: int = 0, limit_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run a further container of the image to its end."""
        name = f"{self.name}-{secrets.token_hex(4)}"
        return self.docker(
            *("run", "--rm", "--name", name), *options, self.image, *words, code=code, limit_s=limit_s
        )

    def up(self, name: str, *more: str, variables: Mapping[str, str] | None = None, code: int = 0) -> None:
        """Start the run of a name, or go on with it; `more` are services besides those of the run."""
        words = ("up", "--detach", "--no-build", *PROCESSES, *more)
        self.compose(*words, variables={"SCPL_RUN": name, **(variables or {})}, code=code)

    def down(self) -> None:
        """Remove containers and networks; the runs stay."""
        self.compose("--profile", "*", "down", "--timeout", 0)

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of the container of a service."""
        [found] = json.loads(self.docker("inspect", f"{self.name}-{service}-1").stdout)
        return dict(found)

    def codes(self) -> dict[str, int]:
        """Exit codes of all services, once none of their containers runs or is about to."""

        def running() -> list[str]:
            states = {name: self.inspect(name)["State"] for name in PROCESSES}
            return [name for name, state in states.items() if state["Running"] or state["Restarting"]]

        until_nothing(running, limit_s=600)
        return {name: self.inspect(name)["State"]["ExitCode"] for name in PROCESSES}

    def python(self, service: str, code: str, *words: object) -> str:
        """What a program prints in the container of a service."""
        return self.docker("exec", f"{self.name}-{service}-1", "python", "-c", code, *words).stdout

    def kill(self, service: str) -> None:
        """Kill a service's program, as the kernel does when memory is short: to the engine it has failed.

        After the engine's own ``kill``, which means that somebody wants it stopped, nothing is started again.
        """
        self.python(service, _KILL)

    def step(self) -> int:
        """The step that the run says it has come to; -1 as long as it does not answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=10)) as connection:
            try:
                connection.request("GET", "/status")
                status = json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException):
                return -1
        return int(status["step"]) if status["state"] == "running" else -1

    def until_step(self, step: int) -> None:
        """Until the run has come to a step."""

        def missing() -> str:
            found = self.step()
            if found >= step:
                return ""
            state = self.inspect("coordinator")["State"]
            assert state["Running"], self.logs()
            return f"step {found} of {step}\n{self.logs()}"

        until_nothing(missing, limit_s=300)

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-color", *services).stdout

    def run_folder(self, name: str, to: Path) -> Path:
        """A copy of the folder of a run."""
        self.compose("cp", f"coordinator:/srv/scpl/runs/{name}", to)
        return to

    def losses(self, name: str, to: Path) -> Losses:
        """The losses of a run; `to` is where the copy of its folder goes."""
        return losses(self.run_folder(name, to))


_KILL = """
import os, signal
# The first process is the container's init; the program that it has started is its only child.
with open("/proc/1/task/1/children") as children:
    os.kill(int(children.read().split()[0]), signal.SIGKILL)
"""
