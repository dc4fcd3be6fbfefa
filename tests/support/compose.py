"""docker-compose.yml as Docker Compose itself understands it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.programs import ROOT, find

COMPOSE = ROOT / "docker-compose.yml"
STAGES = ("stage-0", "stage-1", "stage-2")
PROCESSES = ("coordinator", *STAGES)


def compose(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    program = find("docker-compose", 'pip install -e ".[test]"')
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SCPL_", "COMPOSE_"))}
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean, **(env or {})},
        cwd=ROOT,
    )


def model(*files: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    """What Compose makes of the files, all profiles included."""
    options = [option for file in files for option in ("-f", file)]
    done = compose(*options, "--profile", "*", "config", "--format", "json", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed
