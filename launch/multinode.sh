#!/usr/bin/env bash
# Train on several machines: the same command on each of them, in any order, within $WAIT seconds.
#
#     HEAD=node1 NODES=2 launch/multinode.sh config/train_gpt2.py --out_dir=/shared/gpt2
#
# HEAD       one of the machines, by a name or an address that all of them know
# NODES      how many machines there are (1)
# PROCESSES  on each machine (auto: one for each GPU; without GPUs, for each CPU core)
# PORT       of HEAD, where they meet (29500); further ports are chosen as needed
# WAIT       seconds to wait for each other (600)
# ID         a name of the run, where several share a HEAD and a PORT (kqv)
# RESTARTS   how often the processes are started again when one has died (3)
#
# HUP, INT, TERM or USR1 to this script, on any of the machines, let all processes finish their step, save and leave.
# The same command goes on from there. A second Ctrl-C ends those of its machine within 30 seconds.

fail() {
    echo "error: $*" >&2
    exit 1
}

answers() {
    timeout 5 bash -c ": < '/dev/tcp/$HEAD/$PORT'" 2>/dev/null
}

NODES=${NODES:-1} PROCESSES=${PROCESSES:-auto} PORT=${PORT:-29500} WAIT=${WAIT:-600} ID=${ID:-kqv} RESTARTS=${RESTARTS:-3}
[[ ${HEAD:-} ]] || fail "HEAD is not set: HEAD=node1 NODES=2 $0 CONFIG, with a machine that all of them know"
[[ $PROCESSES =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]] || fail "PROCESSES is '$PROCESSES': give a number, auto, cpu or gpu"
for name in NODES PORT WAIT; do
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || fail "$name is '${!name}': give a whole number above 0"
done
[[ $RESTARTS =~ ^[0-9]{1,8}$ ]] || fail "RESTARTS is '$RESTARTS': give a whole number"
python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))' 2>/dev/null ||
    fail "python here has no PyTorch: activate the environment that has it (. .venv/bin/activate)"

# This machine's address in the network of HEAD: the others reach it there.
own=$(
    python - "$HEAD" 2>/dev/null <<'END'
import ipaddress, socket, sys

family, kind, _, _, there = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
here = socket.socket(family, kind)
here.connect(there)  # sends nothing
address = here.getsockname()[0]
print(address, int(address == there[0]), int(ipaddress.ip_address(there[0]).is_loopback))
END
) || fail "HEAD is '$HEAD', which this machine can't resolve or has no way to: give a name or an address of the first machine"
read -r address is_head is_loopback <<<"$own"

meeting="join_timeout=$WAIT"
if [[ $is_loopback == 1 ]]; then # of several on this machine the first will be the head
    address=$HEAD
elif [[ $is_head == 1 ]]; then
    answers && fail "PORT is $PORT, which is in use on $HEAD: end what is there, or give all machines another PORT"
    address=$HEAD meeting+=",is_host=1"
else
    meeting+=",is_host=0"
    until answers; do
        ((SECONDS < WAIT)) || fail "nobody answered at HEAD=$HEAD, PORT=$PORT for $WAIT s: check that address," \
            "the network between the machines, and that the same command runs on $HEAD"
        sleep 1
    done
fi

# torchrun, whose errors of a failed meeting become one line each.
torchrun='
import sys
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.run import main

head, port, nodes, wait = sys.argv[1:5]
del sys.argv[1:5]
try:
    main()
except RendezvousClosedError:
    sys.exit("error: another machine has ended the run: look at its output")
except RendezvousError as error:
    sys.exit(
        f"error: {nodes} machines did not meet at {head}:{port} within {wait} s ({type(error).__name__}): start "
        "the same command on each, with HEAD an address of the first that all of them know, and NODES their number"
    )
except SignalException as error:
    sys.exit(128 + error.sigval)
'

stopping='' started=''
trap 'stopping=yes' HUP TERM USR1
trap '[[ $stopping ]] && kill "$agent"; stopping=yes' INT
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # with a shared one, a machine that comes back is not let in
set -m # a process group of its own: a Ctrl-C reaches this script alone
(
    trap '' USR1 # it would end torchrun, and a process that has not installed its handler yet
    exec python -c "$torchrun" "$HEAD" "$PORT" "$NODES" "$WAIT" --nnodes="$NODES" --nproc_per_node="$PROCESSES" \
        --rdzv_backend=c10d --rdzv_endpoint="$HEAD:$PORT" --rdzv_id="$ID" --rdzv_conf="$meeting" \
        --local_addr="$address" --max_restarts="$RESTARTS" "$(dirname "$0")/../train.py" --init_from=auto "$@"
) &
agent=$!
set +m
while kill -0 "$agent" 2>/dev/null; do
    pgrep -P "$agent" >/dev/null && started=yes
    if [[ $stopping && $started ]]; then
        pkill -USR1 -P "$agent" # repeated, since a process that has just started ignores it
    elif [[ $stopping ]]; then
        kill "$agent" # it is still waiting for other machines
    fi
    sleep 1 &
    wait $! # a signal ends the waiting
done
wait "$agent"
