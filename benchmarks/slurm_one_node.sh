#!/bin/bash
# A Slurm of one node for the time of one command, without touching a Slurm that is installed (Debian: slurm-wlm, munge):
#   benchmarks/slurm_one_node.sh .venv/bin/medv reproduce --profile smoke --on slurm
# munge, slurmctld and slurmd run as the user who starts this, with everything they write in a temporary folder. If anything
# fails to start, the ends of their logs are printed. There is no accounting data base, and no cgroup keeps jobs to their cores.

set -euo pipefail
export PATH=$PATH:/usr/sbin
for command in munged slurmctld slurmd sbatch; do
    command -v "$command" > /dev/null || { echo "$command is not installed: apt-get install slurm-wlm munge" >&2; exit 2; }
done

place=$(mktemp -d)
chmod 755 "$place"
mkdir -m 700 "$place/key" && mkdir -p "$place/state" "$place/spool"
export SLURM_CONF=$place/slurm.conf
started=()

stop() {
    scancel --user "$(id -un)" 2> /dev/null || true
    kill "${started[@]}" 2> /dev/null || true
    wait || true
    rm -rf "$place"
}
trap stop EXIT

dd if=/dev/urandom of="$place/key/munge.key" bs=128 count=1 status=none
chmod 600 "$place/key/munge.key"
munged --foreground --force --key-file="$place/key/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
    --seed-file="$place/key/munge.seed" --log-file="$place/munged.log" > "$place/munged.out" 2>&1 &
started+=($!)

port=$((20000 + $$ % 20000))
cat > "$SLURM_CONF" << END
ClusterName=one
SlurmctldHost=$(hostname -s)(localhost)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=5
$(slurmd -C | sed -n 's/^\(NodeName=.*\)$/\1 NodeAddr=localhost State=UNKNOWN/p')
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

for _ in $(seq 50); do [ -S "$place/munge.socket" ] && break; sleep 0.1; done
slurmctld -D > "$place/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D > "$place/slurmd.log" 2>&1 &
started+=($!)
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%T 2> /dev/null || true)" = idle ] && break
    sleep 0.5
done
if [ "$(sinfo --noheader --format=%T 2> /dev/null || true)" != idle ]; then
    echo "the node did not come up:" >&2
    tail -n 20 "$place"/*.log "$place"/munged.out >&2
    exit 1
fi
"$@"
