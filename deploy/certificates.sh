#!/usr/bin/env bash
# A certificate authority of your own, and with it a certificate for the server's machine.
#
#   deploy/certificates.sh DIR HOST [HOST ...]      HOST: every name and address clients dial
#
# The certificate is for localhost and 127.0.0.1 too, where a SuperLink dials itself. The script
# leaves in DIR: ca.crt (for every SuperNode and for `flwr`), server.crt and server.key (for the
# SuperLink and the ServerApp's stream), ca.key (for nobody: keep it off the network) and ca.srl
# (openssl's count). A CA that is there already is used again, so that a new server certificate
# needs no visit to the devices. Nothing is replaced unless all went well.
set -euo pipefail
umask 077

if [ $# -lt 2 ]; then
    sed -n '2,10p' "$0" >&2
    exit 2
fi
directory=$1
shift
mkdir -p "$directory"
new=$(mktemp -d "$directory/.new.XXXXXX")
trap 'rm -rf "$new"' EXIT

quietly() { # openssl's chatter is for when it fails
    "$@" >"$new/log" 2>&1 || { cat "$new/log" >&2; echo "error: openssl failed" >&2; exit 1; }
}

names="DNS:localhost,IP:127.0.0.1"
for host in "$@"; do
    kind=DNS
    [[ $host =~ ^[0-9.]+$ || $host == *:* ]] && kind=IP
    [[ ,$names, == *",$kind:$host,"* ]] || names+=",$kind:$host"
done

if [ ! -f "$directory/ca.key" ] || [ ! -f "$directory/ca.crt" ]; then
    quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=hosl-flower CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$new/ca.key" -out "$new/ca.crt"
    mv "$new/ca.key" "$new/ca.crt" "$directory"
fi
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" >"$new/extensions"
quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" \
    -keyout "$new/server.key" -out "$new/server.csr"
quietly openssl x509 -req -in "$new/server.csr" -days 825 -CAcreateserial \
    -CA "$directory/ca.crt" -CAkey "$directory/ca.key" -CAserial "$directory/ca.srl" \
    -extfile "$new/extensions" -out "$new/server.crt"
mv "$new/server.key" "$new/server.crt" "$directory"
chmod 644 "$directory/ca.crt" "$directory/server.crt"
echo "$directory: ca.crt, server.crt and server.key for $names"
