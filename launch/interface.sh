#!/usr/bin/env bash
# Which network interface the data plane should use is a routing question, so the routing table answers it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/interface.sh ADDRESS

Prints the network interface through which this host reaches ADDRESS, a host name or an IP address.
If ADDRESS is one of this host's own, prints the interface that carries it.

The interface of a cluster is the one that leads to the first host of the list:
    export GLOO_SOCKET_IFNAME=$(launch/interface.sh node-0) TP_SOCKET_IFNAME=$(launch/interface.sh node-0)
launch/node.sh does so by itself; pass it --interface NAME to choose another one.

exit: 0 printed; 2 the name does not resolve, there is no route, or "ip" (package iproute2) is missing
TEXT
}

fail() {
    printf 'interface.sh: %s\n' "$*" >&2
    exit 2
}

case "${1-}" in
-h | --help)
    usage
    exit 0
    ;;
"")
    usage >&2
    exit 2
    ;;
esac
[[ $# -eq 1 ]] || fail "give one address, got $#: $*"
command -v ip >/dev/null || fail 'the command "ip" is missing: install iproute2'

name=$1
here=$(uname -n)
# IPv4 first: gloo and TensorPipe take an IPv4 address where an interface has both.
address=$(getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }') || true
[[ -n $address ]] || address=$(getent ahosts "$name" | awk 'NR == 1 { print $1 }') || true
[[ -n $address ]] || fail "$name does not resolve on $here: add it to DNS or /etc/hosts, or give its address"

route=$(ip -o route get "$address" 2>&1) || fail "$here has no route to $name ($address): $route"
if [[ $route == local\ * ]]; then
    # The route to an own address is the loopback device; the interface that carries the address is meant.
    interface=$(ip -o address show to "$address" | awk 'NR == 1 { print $2 }')
    interface=${interface:-lo} # all of 127.0.0.0/8 is local, most of it on no interface's list
else
    interface=$(awk '{ for (i = 1; i < NF; i++) if ($i == "dev") { print $(i + 1); exit } }' <<<"$route")
fi
[[ -n $interface ]] || fail "no interface in the route from $here to $name ($address): $route"
printf '%s\n' "${interface%%@*}"
