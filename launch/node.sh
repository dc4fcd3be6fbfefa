#!/usr/bin/env bash
# One host's part of a run: choose the interface, then become torchrun. The other scripts only start this one.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/node.sh [OPTION...] CONFIG.toml [WORKER ARGUMENT...]

Starts this host's workers with torchrun. Rank r is stage r; the process of rank 0 starts the coordinator.
The number of hosts times --per-host must be pipeline.stages (times pipeline.replicas). CONFIG.toml must be
the same on all hosts.

options:
  --nodes N            hosts in the run (1)
  --node-rank R        which of them this is, from 0 (0)
  --per-host K         workers on each host (1)
  --master HOST        first host, reachable by all (127.0.0.1)
  --port P             port of torchrun's rendezvous on the first host (29500)
  --control-port P     port of the coordinator on the first host (4711)
  --interface NAME     network interface of the data plane (the one that leads to the first host)
  --join-timeout S     seconds that torchrun waits for all hosts (600)
  --shutdown-timeout S seconds for the last checkpoint after SIGTERM, then SIGKILL (60)
  --max-restarts N     how often torchrun starts this host's workers again when one has failed (3 if
                       --run-dir is among the worker arguments, else 0: another folder would begin anew)
  --watch-stdin        stop as by SIGTERM when standard input closes; hosts.sh uses it over ssh
  --dry-run            print the command, start nothing
  -h, --help           print this text

interface: torch listens on the address of the host name unless told otherwise, which is a loopback address
on many systems ("127.0.1.1"). This script exports GLOO_SOCKET_IFNAME, TP_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
as the interface that routes to the first host (launch/interface.sh). Where hosts share several networks, name
the first host by its address on the fast one, or give --interface.

restarts: those of another host than the first join the run that goes on. Those of the first host start a new
coordinator with them, which goes on from the last checkpoint. A failure that would come again, such as a NaN
loss, ends each further start within seconds; torchrun cannot know that, and is told a small number for it.

environment: PYTHON (python3) is the interpreter that has torch and scpl_dist.
exit: torchrun's code, 1 for any failure of a worker and for a stop by a signal; 2 for a wrong call.
Everything that torch opens here trusts whoever reaches it: use a private network (SECURITY.md).
TEXT
}

fail() {
    printf 'node.sh: %s\n' "$*" >&2
    exit 2
}

nodes=1 node_rank=0 per_host=1 master=127.0.0.1 port=29500 control_port=4711 interface='' join_timeout=600 shutdown_timeout=60
max_restarts='' watch_stdin=false dry_run=false
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --watch-stdin) watch_stdin=true ;;
    --dry-run) dry_run=true ;;
    --nodes | --node-rank | --per-host | --master | --port | --control-port | --interface | \
        --join-timeout | --shutdown-timeout | --max-restarts)
        [[ $# -gt 1 ]] || fail "$1 needs a value"
        name=${1#--}
        printf -v "${name//-/_}" '%s' "$2"
        shift
        ;;
    --)
        shift
        break
        ;;
    -*) fail "unknown option $1, see --help" ;;
    *) break ;;
    esac
    shift
done
[[ $# -gt 0 ]] || fail "give the configuration file, see --help"
config=$1
shift
if [[ -z $max_restarts ]]; then
    max_restarts=0
    for argument in "$@"; do
        [[ $argument != --run-dir && $argument != --run-dir=* ]] || max_restarts=3
    done
fi
for name in nodes node_rank per_host port control_port join_timeout shutdown_timeout max_restarts; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "--${name//_/-} = '${!name}' is no whole number"
done
((nodes > 0 && per_host > 0)) || fail "--nodes and --per-host must be at least 1"
((node_rank < nodes)) || fail "--node-rank = $node_rank: ranks of $nodes hosts are 0 to $((nodes - 1))"
[[ -r $config ]] || fail "configuration file $config is not readable on $(uname -n)"

if [[ -z $interface ]]; then
    interface=$("$(dirname "${BASH_SOURCE[0]}")/interface.sh" "$master")
    [[ $nodes -eq 1 || $interface != lo ]] ||
        fail "$master is a loopback address on $(uname -n), other hosts cannot reach it: name the first" \
            "host by its address on the private network"
elif [[ ! -e /sys/class/net/$interface ]]; then
    fail "--interface = $interface: $(uname -n) has $(cd /sys/class/net && echo *)"
fi

environment=(GLOO_SOCKET_IFNAME="$interface" TP_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface")
command=("${PYTHON:-python3}" -m torch.distributed.run
    --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$per_host"
    --master-addr "$master" --master-port "$port" --shutdown-timeout "$shutdown_timeout"
    --rdzv-conf "timeout=$join_timeout" --max-restarts "$max_restarts"
    -m scpl_dist worker "$config" -o "control.host=$master" -o "control.port=$control_port" "$@")
if $dry_run; then
    printf '%q ' env "${environment[@]}" "${command[@]}"
    printf '\n'
    exit 0
fi
export "${environment[@]}"
if ! $watch_stdin; then
    exec "${command[@]}"
fi

# A lost ssh connection does not end what it started, but it closes standard input: the signal to stop.
exec 3<&0
"${command[@]}" </dev/null 3<&- &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
{
    cat <&3 >/dev/null || true
    kill -TERM "$child"
} >/dev/null 2>&1 &
watcher=$!
exec 3<&-
while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a trapped signal ends `wait` before the child has ended
done
code=0
wait "$child" || code=$? # asked again: the code of the child itself
kill "$watcher" 2>/dev/null || true
exit "$code"
