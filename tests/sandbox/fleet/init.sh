#!/usr/bin/env bash
# First process of a fleet, in namespaces that are already its own: gives the login host and every node a name and a link, then starts
# what it reads from standard input, a command a line. When that closes, the test is over or was killed: everything ends and the folder
# goes. Should this process be killed, the kernel ends everything in its namespace.
#
# init.sh FOLDER LOGIN LOGIN_ADDRESS [NODE ADDRESS]...
set -u
folder=$1 login=$2 login_address=$3
shift 3
declare -A anchors

# Runs a command on a node; only for commands from standard input, which have a process of their own.
on() {
    local node=$1
    shift
    exec nsenter --target "${anchors[$node]}" --net --uts -- "$@"
}

# A process that only keeps a node's namespaces, under a name by which the test finds it; a link to the others.
make_node() {
    local node=$1 address=$2
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --net --uts -- bash -c 'hostname "$0" && exec -a "$0@$1" sleep infinity' "$node" "$folder" < /dev/null &
    local anchor=$!
    # The namespaces are there once it is asleep.
    until [ "$(cat "/proc/$anchor/comm")" = sleep ]; do sleep 0.01; done
    ip link add "to-$node" type veth peer name eth0 netns "$anchor" || return
    ip link set "to-$node" master bridge up || return
    nsenter --target "$anchor" --net -- sh -c "ip link set lo up && ip addr add $address/24 dev eth0 && ip link set eth0 up" || return
    anchors[$node]=$anchor
}

make_all() {
    mount --bind "$folder/hosts" /etc/hosts || return
    # Servers may want folders there, and nothing of them may stay.
    mount -t tmpfs tmpfs /run && mkdir /run/sshd || return
    hostname "$login" && ip link set lo up && ip link add bridge type bridge || return
    ip addr add "$login_address/24" dev bridge && ip link set bridge up || return
    while [ $# -gt 0 ]; do
        make_node "$1" "$2" || return
        shift 2
    done
}

make_all "$@" && touch "$folder/ready"
while read -r line; do
    eval "$line" < /dev/null &
done
# Everything in this process namespace, except for this process.
kill -KILL -1
for _ in {1..50}; do
    rm -rf "$folder" && break
    sleep 0.1
done
