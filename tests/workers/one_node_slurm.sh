#!/usr/bin/env bash
# A real Slurm on this machine for tests/test_slurm.py: one_node_slurm.sh start|stop FOLDER, as root, with Debian's slurm-wlm.
# Two partitions: a job in `high` preempts one in `low`, which goes back into the queue.
set -euo pipefail
folder=$(mkdir -p "$2" && cd "$2" && pwd)
host=$(hostname -s)

if [ "$1" = stop ]; then
  for daemon in slurmd slurmctld munged; do
    [ ! -s "$folder/$daemon.pid" ] || kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
  done
  exit 0
fi

mkdir -p "$folder/state" "$folder/spool"
chmod 755 "$folder"
# cred_expire: a job that was preempted may start again after as many seconds, instead of two minutes.
cat >"$folder/slurm.conf" <<CONF
ClusterName=halfbyte
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=$host PriorityTier=10 State=UP
CONF
if ! munge -n >/dev/null 2>&1; then
  install -d -o munge /run/munge
  su -s /bin/sh munge -c /usr/sbin/munged
  cp /run/munge/munged.pid "$folder/munged.pid"
fi
slurmctld -f "$folder/slurm.conf"
slurmd -f "$folder/slurm.conf"
for _ in $(seq 40); do
  if SLURM_CONF=$folder/slurm.conf sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then exit 0; fi
  sleep 0.25
done
echo "Slurm did not come up: $folder/slurmctld.log, $folder/slurmd.log" >&2
exit 1
