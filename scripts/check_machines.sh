#!/usr/bin/env bash
# Runs the commands of docs/guides/deployment.md, "On several machines", in three network namespaces: a server and two
# nodes with TLS and keys of their own. After two rounds a node's cable is cut for 50 seconds. Prints the server's log,
# and fails where no client drops out, or some are missing at the end.
#
# sudo env PATH="$PATH" scripts/check_machines.sh FOLDER     (Linux, iproute2, openssl, ssh-keygen; up to ten minutes)
set -euo pipefail
folder=$(realpath -m "${1:?name a new folder}")
[ ! -e "$folder" ] || { echo "$folder is there already: name a new folder" >&2; exit 2; }
if [ -e /run/netns/jaxfed-server ] || ip link show jaxfed-bridge > /dev/null 2>&1; then
    echo "another check is running, or was cut off: ip netns list; ip link" >&2
    exit 2
fi
export FLWR_TELEMETRY_ENABLED=0 HOME="$folder/server" FLWR_HOME="$folder/server/.flwr"
mkdir -p "$folder"/{server/.flwr,server/federation,node0/node,node1/node} /etc/netns

clean_up() {
    for machine in server node0 node1; do
        ip netns pids "jaxfed-$machine" 2>/dev/null | xargs -r kill -9 || true
        ip link del "jf-$machine" 2>/dev/null || true  # a namespace keeps its end until its last process is gone
        ip netns del "jaxfed-$machine" 2>/dev/null || true
        rm -rf "/etc/netns/jaxfed-$machine"
    done
    ip link del jaxfed-bridge 2>/dev/null || true
}
trap clean_up EXIT

ip link add jaxfed-bridge type bridge
ip link set jaxfed-bridge up
address=1
for machine in server node0 node1; do
    at="jaxfed-$machine"
    mkdir -p "/etc/netns/$at"
    printf "127.0.0.1 localhost\n10.9.0.1 server.example\n" > "/etc/netns/$at/hosts"
    ip netns add "$at"
    ip link add "jf-$machine" type veth peer name eth0 netns "$at"
    ip link set "jf-$machine" master jaxfed-bridge up
    ip -n "$at" address add "10.9.0.$address/24" dev eth0
    ip -n "$at" link set eth0 up
    ip -n "$at" link set lo up
    address=$((address + 1))
done

# facts, data and Flower's app, as `jaxfed deploy` writes them; its own run is of no use here
jaxfed deploy synthetic_1k --data.users 40 --data.items 60 --data.mean-length 9 --model.dim 4 --cohort.size 12 \
    --rounds 100 --evaluation.every 100 --nodes 2 --out "$folder/example" > "$folder/example.log" 2>&1

cd "$folder/server"
openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj "/CN=our federation" -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj "/CN=server.example" -keyout server.key -out server.csr 2>/dev/null
printf "subjectAltName=DNS:server.example,DNS:localhost,IP:127.0.0.1" > names.txt
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile names.txt \
    -out server.crt 2>/dev/null
cp "$folder"/example/server/{config.toml,facts.json} federation
cat > .flwr/config.toml <<CONFIG
[superlink]
default = "here"
[superlink.here]
address = "localhost:8000"
root-certificates = "$folder/server/ca.crt"
CONFIG
ip netns exec jaxfed-server flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt \
    --ssl-keyfile server.key --enable-supernode-auth --host 0.0.0.0 --port 8000 \
    --disable-runtime-dependency-installation > superlink.log 2>&1 &
sleep 10

for node in 0 1; do
    at="jaxfed-node$node"
    cd "$folder/node$node"
    ssh-keygen -q -t ecdsa -b 384 -N "" -f "key"
    cp "$folder/server/ca.crt" .
    cp "$folder"/example/server/{config.toml,facts.json} "$folder/example/nodes/$node/data.npz" node
    ip netns exec jaxfed-server flwr supernode register key.pub here
    HOME="$PWD" ip netns exec "$at" jaxfed node "$PWD/node" > keeper.log 2>&1 &
    HOME="$PWD" ip netns exec "$at" jaxfed connect "$PWD/node" --superlink server.example:8000 \
        --root-certificates ca.crt --private-key key > supernode.log 2>&1 &
done

cd "$folder/server"
ip netns exec jaxfed-server flwr run "$folder/example/app" here \
    --run-config "folder=\"$folder/server/federation\" nodes=2 deadline=30.0"
for _ in $(seq 600); do
    grep -qs "^round 2:" federation/server.log && break
    [ ! -e federation/error.txt ] || { cat federation/error.txt >&2; exit 1; }
    sleep 0.5
done
grep -qs "^round 2:" federation/server.log || { tail superlink.log "$folder"/node*/*.log >&2; exit 1; }
ip -n jaxfed-node1 link set eth0 down
sleep 50
ip -n jaxfed-node1 link set eth0 up
for _ in $(seq 200); do
    [ -e federation/summary.json ] && break
    sleep 1
done
cat federation/server.log
[ -e federation/summary.json ]
grep -q " [1-9][0-9]* dropped out" federation/server.log
tail -1 federation/server.log | grep -q " 0 dropped out"
