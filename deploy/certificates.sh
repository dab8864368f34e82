#!/usr/bin/env bash
# A certificate authority of your own, and with it a certificate for the server's machine.
#
#   deploy/certificates.sh DIR HOST [HOST ...]      HOST: every name and address clients dial
#
# leaves in DIR: ca.crt (for every SuperNode and for `flwr`), server.crt and server.key (for the
# SuperLink and the ServerApp's stream), ca.key (for nobody: keep it off the network). A CA that
# is there already is used again, so that a new server certificate needs no visit to the devices.
set -euo pipefail
umask 077

if [ $# -lt 2 ]; then
    sed -n '2,8p' "$0" >&2
    exit 2
fi
directory=$1
shift
mkdir -p "$directory"

names=""
for host in "$@"; do
    kind=DNS
    [[ $host =~ ^[0-9.]+$ || $host == *:* ]] && kind=IP
    names+="${names:+,}$kind:$host"
done

if [ ! -f "$directory/ca.key" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=hosl-flower CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$directory/ca.key" -out "$directory/ca.crt" 2>/dev/null
fi
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" \
    -keyout "$directory/server.key" -out "$directory/server.csr" 2>/dev/null
openssl x509 -req -in "$directory/server.csr" -days 825 -CAcreateserial \
    -CA "$directory/ca.crt" -CAkey "$directory/ca.key" -out "$directory/server.crt" \
    -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names") 2>/dev/null
rm "$directory/server.csr"
chmod 644 "$directory/ca.crt" "$directory/server.crt"
echo "$directory: ca.crt, server.crt and server.key for $names"
