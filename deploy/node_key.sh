#!/usr/bin/env bash
# The key by which one SuperNode is known: made on the device, never leaves it.
#
#   deploy/node_key.sh DIR NAME
#
# leaves in DIR: NAME (private, for --auth-supernode-private-key) and NAME.pub, which the operator
# registers with `flwr supernode register NAME.pub <superlink>`.
set -euo pipefail
umask 077

if [ $# -ne 2 ]; then
    sed -n '2,7p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$2" -f "$1/$2"
echo "$1/$2.pub"
