#!/usr/bin/env bash
# slurm_local.sh - a real Slurm with two "nodes" on one Debian 12 machine, for tests only.
#
#   bash scripts/slurm_local.sh            install (apt), configure, start, verify with a 2-task job
#   bash scripts/slurm_local.sh start      configure + start only (packages already there)
#   bash scripts/slurm_local.sh verify     run only the check
#   bash scripts/slurm_local.sh stop       stop the daemons this script started
#   bash scripts/slurm_local.sh status
#
# Needs root. No systemd, no cgroups, no accounting database.
# Safe to call again: a step already done is skipped.
# What the settings are for: cred_expire=5 makes a requeued job start again in seconds (129 s measured without it);
# preempt_send_user_signal makes preemption send the job's --signal (so that a run can save and be queued again);
# partition "high" preempts partition "main".
# SLURM_ROOT (default /var/tmp/slurm-local): state, logs and the generated slurm.conf.
set -euo pipefail

ROOT=${SLURM_ROOT:-/var/tmp/slurm-local}
CONF=$ROOT/slurm.conf
HOST=$(hostname -s)
CPUS_PER_NODE=${SLURM_LOCAL_CPUS:-2}      # per node; two nodes: oversubscribes a 2-core machine on purpose
MEM_PER_NODE=${SLURM_LOCAL_MEM:-4000}     # MiB, what each node says it has
export SLURM_CONF=$CONF

say() { printf '[slurm_local] %s\n' "$*"; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

install_packages() {
  if command -v slurmctld >/dev/null && command -v slurmd >/dev/null \
     && command -v sbatch >/dev/null && command -v munged >/dev/null; then
    say "packages are there: $(slurmctld -V)"; return
  fi
  apt-get update -qq
  # policy-rc.d: no package may try to start a service on a machine without systemd
  local made=0
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; made=1
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
  [ $made = 0 ] || rm -f /usr/sbin/policy-rc.d
  say "installed: $(slurmctld -V)"
}

write_config() {
  mkdir -p "$ROOT"/{state,log,spool-n1,spool-n2}
  chmod 755 "$ROOT"
  cat >"$CONF.new" <<CONFEND
ClusterName=local
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$ROOT/munge.socket,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool-%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
MinJobAge=600
KillWait=10
Waittime=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MaxArraySize=1001
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17001 CPUs=$CPUS_PER_NODE RealMemory=$MEM_PER_NODE State=UNKNOWN
NodeName=n2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17002 CPUs=$CPUS_PER_NODE RealMemory=$MEM_PER_NODE State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n1,n2 Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONFEND
  mv "$CONF.new" "$CONF"
  # cgroups are not used, but slurmd 22.05 reads the file when it is there; an empty one is fine
  printf 'CgroupPlugin=autodetect\nConstrainCores=no\nConstrainRAMSpace=no\n' >"$ROOT/cgroup.conf"
}

name_nodes() {
  # torch and Lightning take the first node's name as the rendezvous address, so n1 must resolve
  if ! getent hosts n1 >/dev/null || ! getent hosts n2 >/dev/null; then
    echo '127.0.0.1 n1 n2' >>/etc/hosts; say "n1, n2 added to /etc/hosts"
  fi
}

start_munge() {
  if alive "$ROOT/munged.pid"; then say "munged runs"; return; fi
  local key=$ROOT/munge.key
  if [ ! -s "$key" ]; then
    (umask 077; dd if=/dev/urandom of="$key" bs=1024 count=1 status=none)
  fi
  chown root:root "$key"; chmod 600 "$key"
  rm -f "$ROOT/munge.socket" "$ROOT/munge.socket.lock"
  munged --key-file="$key" --socket="$ROOT/munge.socket" --pid-file="$ROOT/munged.pid" \
         --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge.seed" --force
  munge -S "$ROOT/munge.socket" -n | unmunge -S "$ROOT/munge.socket" >/dev/null
  say "munged started"
}

start_daemons() {
  if alive "$ROOT/slurmctld.pid"; then say "slurmctld runs"; else
    slurmctld -f "$CONF"; say "slurmctld started"
  fi
  local n
  for n in n1 n2; do
    if alive "$ROOT/slurmd-$n.pid"; then say "slurmd $n runs"; else
      slurmd -N "$n" -f "$CONF"; say "slurmd $n started"
    fi
  done
  local i
  for i in $(seq 1 60); do
    if [ "$(sinfo -h -N -p main -o '%T' 2>/dev/null | grep -Ecx 'idle|mixed|allocated|completing')" = 2 ]; then
      say "both nodes are up"; sinfo; return
    fi
    if [ $((i % 10)) = 0 ]; then scontrol update nodename=n1,n2 state=resume 2>/dev/null || true; fi
    sleep 0.5
  done
  say "nodes did not come up"; sinfo -R || true; tail -20 "$ROOT"/log/*.log; return 1
}

verify() {
  local out=$ROOT/verify.out job
  rm -f "$out"
  job=$(sbatch --parsable --wait -J verify -N 2 --ntasks-per-node=1 -t 2 -o "$out" \
        --wrap 'srun bash -c "echo task \$SLURM_PROCID of \$SLURM_NTASKS on \$SLURMD_NODENAME"')
  cat "$out"
  if [ "$(sort "$out" | grep -Ec '^task [01] of 2 on n[12]$')" = 2 ]; then
    say "verified: job $job ran 2 tasks on 2 nodes"
  else
    say "verification FAILED"; return 1
  fi
}

stop_all() {
  local f
  for f in slurmd-n1 slurmd-n2 slurmctld munged; do
    if alive "$ROOT/$f.pid"; then kill "$(cat "$ROOT/$f.pid")"; say "stopped $f"; fi
  done
}

case ${1:-all} in
  all)    install_packages; write_config; name_nodes; start_munge; start_daemons; verify
          say "use it with: export SLURM_CONF=$CONF" ;;
  start)  write_config; name_nodes; start_munge; start_daemons ;;
  verify) verify ;;
  stop)   stop_all ;;
  status) sinfo; squeue ;;
  *)      say "unknown command: $1"; exit 2 ;;
esac
