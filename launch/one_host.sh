#!/usr/bin/env bash
# torchrun on one host, all on loopback. `scpl-dist train` does the same without torchrun and reports better.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/one_host.sh STAGES [NODE OPTION...] CONFIG.toml [WORKER ARGUMENT...]

Starts STAGES workers on this host with torchrun, over the loopback interface. STAGES must be pipeline.stages
(times pipeline.replicas).
Node options are those of launch/node.sh, for example --port, --dry-run. To choose another interface than
loopback, for example to measure it: --master ADDRESS, or --interface NAME as launch/interface.sh prints it.

example: launch/one_host.sh 2 examples/digits.toml
exit: as launch/node.sh
TEXT
}

case "${1-}" in
-h | --help)
    usage
    exit 0
    ;;
"" | *[!0-9]*)
    printf "one_host.sh: STAGES = '%s' is no whole number, see --help\n" "${1-}" >&2
    exit 2
    ;;
esac
stages=$1
shift
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" --per-host "$stages" "$@"
