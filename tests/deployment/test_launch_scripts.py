"""The launch scripts build commands that torchrun's own parser accepts, and they stop what they start."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.support.hosts import ip
from tests.support.programs import ROOT, Program, find, need_root, run, until_nothing

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
# Stands in for the interpreter where only a script's own work is tested: says what it got, ends on SIGTERM.
INTERPRETER = """#!/bin/bash
trap 'echo "stopped $GLOO_SOCKET_IFNAME $*"; exit 5' TERM
echo "started $*"
[[ -z $READY ]] || touch "$READY/$$"
if [[ "$*" == *--node-rank\\ $FAILING_RANK* ]]; then
    until [[ $(ls "$READY" | wc -l) -eq 3 ]]; do sleep 0.01; done
    exit 7
fi
while :; do sleep 0.05; done
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "config.toml", "[pipeline]\nstages = 3\n")


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    return write(tmp_path / "interpreter", INTERPRETER)


def torchrun_arguments(line: str) -> dict[str, object]:
    """The parsed torchrun command of a dry run, with the environment it sets under "env"."""
    words = shlex.split(line)
    assert words[0] == "env"
    start = next(index for index, word in enumerate(words) if word.endswith("python3"))
    assert words[start + 1 : start + 3] == ["-m", "torch.distributed.run"]
    parsed = vars(get_args_parser().parse_args(words[start + 3 :]))
    return {**parsed, "env": dict(word.split("=", 1) for word in words[1:start])}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_clean_for_shellcheck(script: Path) -> None:
    done = run(find("shellcheck", "apt-get install shellcheck"), script)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_says_usage_interface_and_exit_or_stop(script: Path) -> None:
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")
    done = run("bash", script, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"launch/{script.name}" in done.stdout
    assert "launch/interface.sh" in done.stdout
    assert "\nexit: " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 110


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_call_without_arguments_fails_with_two_and_says_what_is_missing(script: Path) -> None:
    done = run("bash", script, env={"SLURM_JOB_NODELIST": ""})
    assert done.returncode == 2
    assert done.stderr


def test_node_option_without_a_value_is_refused() -> None:
    done = run(LAUNCH / "node.sh", "--port")
    assert (done.returncode, done.stderr) == (2, "node.sh: --port needs a value\n")


def test_one_host_is_torchrun_over_loopback(config: Path) -> None:
    done = run(LAUNCH / "one_host.sh", 3, "--dry-run", config, "-o", "run.seed=1")
    assert done.returncode == 0, done.stderr
    parsed = torchrun_arguments(done.stdout)
    assert parsed["nnodes"] == "1"
    assert parsed["nproc_per_node"] == "3"
    assert parsed["master_addr"] == "127.0.0.1"
    assert parsed["module"] is True
    assert parsed["training_script"] == "scpl_dist"
    control = ["-o", "control.host=127.0.0.1", "-o", "control.port=4711"]
    assert parsed["training_script_args"] == ["worker", str(config), *control, "-o", "run.seed=1"]
    variables = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    assert parsed["env"] == dict.fromkeys(variables, "lo")


def test_node_passes_every_option_on(config: Path) -> None:
    options = ["--nodes", "3", "--node-rank", "2", "--per-host", "4", "--master", "192.0.2.1"]
    options += ["--port", "1111", "--control-port", "2222", "--join-timeout", "8", "--max-restarts", "7"]
    done = run(
        LAUNCH / "node.sh", *options, "--interface", "lo", "--shutdown-timeout", 9, "--dry-run", config
    )
    assert done.returncode == 0, done.stderr
    parsed = torchrun_arguments(done.stdout)
    names = (
        "nnodes",
        "node_rank",
        "nproc_per_node",
        "master_addr",
        "master_port",
        "shutdown_timeout",
        "rdzv_conf",
        "max_restarts",
    )
    assert [parsed[name] for name in names] == ["3", 2, "4", "192.0.2.1", 1111, 9, "timeout=8", 7]
    assert "control.host=192.0.2.1" in str(parsed["training_script_args"])
    assert "control.port=2222" in str(parsed["training_script_args"])


@pytest.mark.parametrize(
    ("arguments", "restarts"), [([], 0), (["--run-dir", "runs/one"], 3), (["--run-dir=runs/one"], 3)]
)
def test_node_has_workers_started_again_where_there_is_a_folder_to_go_on_in(
    arguments: list[str], restarts: int, config: Path
) -> None:
    done = run(LAUNCH / "node.sh", "--dry-run", config, *arguments)
    assert torchrun_arguments(done.stdout)["max_restarts"] == restarts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "two"], "--nodes = 'two' is no whole number"),
        (["--nodes", "0"], "must be at least 1"),
        (["--max-restarts", "-1"], "--max-restarts = '-1' is no whole number"),
        (["--nodes", "2", "--node-rank", "2"], "ranks of 2 hosts are 0 to 1"),
        (["--nodes", "2", "--master", "localhost"], "localhost is a loopback address"),
        (["--master", "no-such-host.invalid"], "no-such-host.invalid does not resolve"),
        (["--interface", "none7"], "--interface = none7"),
        (["--what"], "unknown option --what"),
        (["missing.toml"], "missing.toml is not readable"),
    ],
)
def test_node_refuses_what_cannot_work_and_says_why(arguments: list[str], message: str, config: Path) -> None:
    done = run(LAUNCH / "node.sh", *arguments, config)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def watched(config: Path, interpreter: Path) -> Iterator[Program]:
    """node.sh that watches its standard input, and its child, which has started."""
    command = (LAUNCH / "node.sh", "--watch-stdin", config)
    environment = {"PYTHON": str(interpreter), "FAILING_RANK": "-"}
    with Program(*command, env=environment, stdin=subprocess.PIPE) as program:
        program.wait_for("started -m torch.distributed.run")
        yield program


def test_node_stops_its_child_when_standard_input_closes(watched: Program) -> None:
    assert watched.process.stdin is not None
    watched.process.stdin.close()
    assert watched.wait(30) == 5  # the code of its child
    assert "\nstopped lo" in watched.output


def test_node_passes_a_signal_on_and_returns_the_code_of_its_child(watched: Program) -> None:
    watched.signal(signal.SIGTERM)
    assert watched.wait(30) == 5
    assert "\nstopped" in watched.output


def test_hosts_dry_run_starts_one_node_on_each_host(config: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# the cluster\nuser@192.0.2.1\n\n192.0.2.2 # second\n192.0.2.3\n")
    from_file = run(LAUNCH / "hosts.sh", f"@{hostfile}", "--per-host", 2, "--dry-run", config)
    as_list = run(
        LAUNCH / "hosts.sh", "user@192.0.2.1,192.0.2.2,192.0.2.3", "--per-host", 2, "--dry-run", config
    )
    assert from_file.returncode == 0, from_file.stderr
    assert from_file.stdout == as_list.stdout
    lines = [shlex.split(line) for line in from_file.stdout.splitlines()]
    assert [words[5] for words in lines] == ["user@192.0.2.1", "192.0.2.2", "192.0.2.3"]
    for rank, words in enumerate(lines):
        assert words[:5] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
        inner = shlex.split(words[6])
        assert inner[inner.index("--node-rank") + 1] == str(rank)
        assert inner[inner.index("--master") + 1] == "192.0.2.1"
        assert inner[inner.index("--nodes") + 1] == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "give the list of hosts first"),
        (["a b,c", "x"], "'a b' is no host name"),
        (["-oProxyCommand=x", "x"], "give the list of hosts first"),
        (["a,-oProxyCommand=x", "x"], "is no host name"),
        (["@/no/such/file", "x"], "/no/such/file is not readable"),
        (["a,b"], "give the configuration file"),
        (["a,b", "--nodes", "2", "x"], "--nodes is set by the list"),
    ],
)
def test_hosts_refuses_a_wrong_list(arguments: list[str], message: str) -> None:
    done = run(LAUNCH / "hosts.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def here_as_ssh(tmp_path: Path, interpreter: Path) -> dict[str, str]:
    """An `ssh` that runs the command on this host, so that hosts.sh can be watched without a cluster."""
    ssh = write(tmp_path / "ssh", '#!/bin/bash\nshift 4\nhost=$1\nshift\nexec bash -c "$*"\n')
    return {"SSH": str(ssh), "PYTHON": str(interpreter), "FAILING_RANK": "-"}


def test_hosts_stops_all_when_one_fails_and_names_it(
    config: Path, here_as_ssh: dict[str, str], tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    environment = {**here_as_ssh, "FAILING_RANK": "1", "READY": str(ready)}
    done = run(LAUNCH / "hosts.sh", "127.0.0.1,b,c", "--interface", "lo", config, env=environment)
    assert done.returncode == 7
    assert "hosts.sh: host b (rank 1) ended with code 7" in done.stderr
    assert done.stdout.count("started") == 3
    assert done.stdout.count("stopped lo") == 2


@pytest.fixture
def two_hosts(config: Path, here_as_ssh: dict[str, str]) -> Iterator[Program]:
    """hosts.sh, whose two hosts have started."""
    with Program(LAUNCH / "hosts.sh", "127.0.0.1,b", "--interface", "lo", config, env=here_as_ssh) as program:
        program.wait_for("started", 2)
        yield program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_hosts_stops_all_hosts_on_a_signal(two_hosts: Program, number: signal.Signals) -> None:
    two_hosts.signal(number)
    assert two_hosts.wait(30) == 5
    assert two_hosts.output.count("stopped lo") == 2


def test_hosts_stops_the_remote_ends_when_it_is_killed(two_hosts: Program) -> None:
    two_hosts.signal(signal.SIGKILL)
    until_nothing(lambda: two_hosts.output.count("stopped lo") < 2 and two_hosts.output)


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """Stand-ins with the calling conventions of Slurm: one task a node, each with its own SLURM_NODEID."""
    tools = tmp_path / "bin"
    tools.mkdir()
    write(
        tools / "scontrol",
        '#!/bin/bash\n[[ "$*" == "show hostnames node[1-2]" ]] && printf "localhost\\nnode2\\n"\n',
    )
    write(
        tools / "srun",
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for rank in 0 1; do SLURM_NODEID=$rank "$@"; done\n',
    )
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_slurm_starts_one_node_on_each_node_of_the_allocation(
    config: Path, allocation: dict[str, str]
) -> None:
    options = ["--per-host", "2", "--interface", "lo", "--dry-run"]
    done = run("bash", LAUNCH / "slurm.sbatch", *options, config, env=allocation)
    assert done.returncode == 0, done.stderr
    parsed = [torchrun_arguments(line) for line in done.stdout.splitlines()]
    assert [arguments["node_rank"] for arguments in parsed] == [0, 1]
    assert {arguments["master_addr"] for arguments in parsed} == {"localhost"}
    assert {arguments["nnodes"] for arguments in parsed} == {"2"}


@pytest.mark.parametrize(
    ("count", "arguments", "expected"),
    [
        (None, [], ["--run-dir", "runs/slurm-77"]),
        ("0", ["--run-dir=runs/one"], ["--run-dir=runs/one"]),
        ("1", [], ["--run-dir", "runs/slurm-77", "--resume", "auto"]),
        ("2", ["--run-dir", "runs/one"], ["--run-dir", "runs/one", "--resume", "auto"]),
    ],
)
def test_a_job_that_slurm_starts_again_goes_on_in_the_same_folder(
    count: str | None, arguments: list[str], expected: list[str], config: Path, allocation: dict[str, str]
) -> None:
    environment = allocation | ({} if count is None else {"SLURM_RESTART_COUNT": count})
    command = ("bash", LAUNCH / "slurm.sbatch", "--interface", "lo", "--dry-run", config, *arguments)
    done = run(*command, env=environment)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        parsed = torchrun_arguments(line)
        given = parsed["training_script_args"]
        assert isinstance(given, list)
        assert given[-len(expected) :] == expected
        assert given[: -len(expected)][-1] == "control.port=4711"
        assert parsed["max_restarts"] == 3


@pytest.fixture
def host_with_two_networks() -> Iterator[str]:
    """A network namespace with the interfaces lo, fast (10.91.0.2/24) and slow (10.92.0.2/24)."""
    find("ip", "apt-get install iproute2")
    need_root()
    name = f"scpl-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        for interface, address in (("fast", "10.91.0.2/24"), ("slow", "10.92.0.2/24")):
            ip("-n", name, "link", "add", interface, "type", "veth", "peer", f"{interface}-far")
            ip("-n", name, "address", "add", address, "dev", interface)
            for end in (interface, f"{interface}-far"):
                ip("-n", name, "link", "set", end, "up")
        yield name
    finally:
        ip("netns", "delete", name)


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.91.0.7", "fast"),
        ("10.92.0.7", "slow"),
        ("10.92.0.2", "slow"),
        ("127.0.0.1", "lo"),
        ("127.0.1.1", "lo"),
    ],
)
def test_interface_is_the_one_that_routes_to_the_address(
    host_with_two_networks: str, address: str, interface: str
) -> None:
    done = run("ip", "netns", "exec", host_with_two_networks, LAUNCH / "interface.sh", address)
    assert (done.stdout, done.stderr, done.returncode) == (f"{interface}\n", "", 0)


def test_interface_says_when_there_is_no_route(host_with_two_networks: str) -> None:
    done = run("ip", "netns", "exec", host_with_two_networks, LAUNCH / "interface.sh", "10.93.0.1")
    assert done.returncode == 2
    assert "no route to 10.93.0.1" in done.stderr
