#!/usr/bin/env bash
# torchrun on a list of hosts over ssh: one node.sh on each, all stopped when one fails or this script ends.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/hosts.sh HOST,HOST,... [NODE OPTION...] CONFIG.toml [WORKER ARGUMENT...]
       launch/hosts.sh @FILE [NODE OPTION...] CONFIG.toml [WORKER ARGUMENT...]

Starts launch/node.sh on every host over ssh, in the order of the list: the first host has rank 0, the
rendezvous and the coordinator. @FILE has one host a line; "#" starts a comment. Name hosts as the other hosts
reach them, the first one by its address on the network that the activations should take: every host uses its
interface that routes to the first host (launch/interface.sh), or --interface NAME where all hosts have it.

The project folder, CONFIG.toml and the interpreter must be at the same path on every host; ssh must work
without a password (its own settings are in ~/.ssh/config). Node options are those of launch/node.sh:
--per-host K, --port P, --control-port P, --interface NAME, --join-timeout S, --shutdown-timeout S,
--max-restarts N. --dry-run prints the commands and starts nothing.

environment: PYTHON is the interpreter on all hosts (python3); SSH is the ssh command (ssh).
example: PYTHON=/opt/scpl/bin/python launch/hosts.sh 10.0.0.1,10.0.0.2,10.0.0.3 config.toml
stop: SIGTERM or Ctrl-C stops all stages after a checkpoint; a second one ends the ssh connections.
exit: 0, or the code of the first host that failed; 2 for a wrong call
TEXT
}

fail() {
    printf 'hosts.sh: %s\n' "$*" >&2
    exit 2
}

case "${1-}" in
-h | --help)
    usage
    exit 0
    ;;
"" | -*) fail "give the list of hosts first, see --help" ;;
@*)
    [[ -r ${1#@} ]] || fail "host file ${1#@} is not readable"
    mapfile -t hosts < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "${1#@}")
    ;;
*) IFS=, read -r -a hosts <<<"$1" ;;
esac
shift
[[ ${#hosts[@]} -gt 0 ]] || fail "the list of hosts is empty"
for host in "${hosts[@]}"; do
    [[ $host =~ ^[A-Za-z0-9_.:@%-]+$ && $host != -* ]] || fail "'$host' is no host name"
done
dry_run=false
for argument in "$@"; do
    [[ $argument != --dry-run ]] || dry_run=true
    case "$argument" in
    --node-rank | --nodes | --master) fail "$argument is set by the list of hosts" ;;
    *) ;;
    esac
done
[[ $# -gt 0 ]] || fail "give the configuration file, see --help"

read -r -a ssh <<<"${SSH:-ssh} -o BatchMode=yes -o ConnectTimeout=15"
node=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/node.sh
remote() { # the command line for the host of rank $1, as one string for the shell there
    local rank=$1
    shift
    printf 'cd %q && exec env PYTHON=%q %q' "$PWD" "${PYTHON:-python3}" "$node"
    printf ' %q' --watch-stdin --nodes "${#hosts[@]}" --node-rank "$rank" --master "${hosts[0]#*@}" "$@"
}

if $dry_run; then
    for rank in "${!hosts[@]}"; do
        printf '%q ' "${ssh[@]}" "${hosts[rank]}" "$(remote "$rank" "$@")"
        printf '\n'
    done
    exit 0
fi

# All remote ends read this pipe, nobody writes to it: closing it means stop, also if this script dies.
folder=$(mktemp -d)
mkfifo "$folder/open"
exec 9<>"$folder/open"
trap 'rm -rf "$folder"' EXIT
declare -A rank_of=()
for rank in "${!hosts[@]}"; do
    "${ssh[@]}" "${hosts[rank]}" "$(remote "$rank" "$@")" <"$folder/open" 9>&- &
    rank_of[$!]=$rank
done
stop() {
    trap 'kill "${!rank_of[@]}" 2>/dev/null' TERM INT
    exec 9>&-
}
trap stop TERM INT

code=0
while ((${#rank_of[@]} > 0)); do
    status=0
    wait -n -p ended "${!rank_of[@]}" || status=$?
    [[ -n ${ended-} ]] || continue # a signal of our own, not the end of a host
    rank=${rank_of[$ended]}
    unset "rank_of[$ended]"
    if ((status != 0)); then
        printf 'hosts.sh: host %s (rank %s) ended with code %s\n' "${hosts[rank]}" "$rank" "$status" >&2
        if ((code == 0)); then
            code=$status
            stop
        fi
    fi
done
exit "$code"
