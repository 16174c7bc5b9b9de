#!/usr/bin/env bash
# A miniature SLURM cluster on one Debian machine, as root: a login node and NODES compute nodes, each in network, host
# name, mount and process namespaces of its own, with its own address, loopback, ports, /dev/shm and sshd. Files are
# shared, like on a cluster's network file system; processors, memory and clock are too. Killing a node's process 1 is
# the crash of that node. Run again it brings crashed nodes back, and does nothing when all is well.
#
#     bash tests/cluster/up.sh; . "${TMPDIR:-/tmp}/opd-ds-cluster/env.sh"; on login sbatch job.sh; on n1 hostname
#     bash tests/cluster/down.sh
#
# BASE     folder of everything, also names the cluster: several can live side by side
# NODES, CPUS, MEMORY (MB), GPUS (not real): what SLURM believes it has
# INSTALL=1  installs the Debian packages first
set -euo pipefail
trap 'echo "up.sh: line $LINENO failed" >&2' ERR
BASE=${BASE:-${TMPDIR:-/tmp}/opd-ds-cluster} NODES=${NODES:-2} CPUS=${CPUS:-8} MEMORY=${MEMORY:-8000} GPUS=${GPUS:-8}
here=$(cd "$(dirname "$0")" && pwd)
shape="NODES=$NODES CPUS=$CPUS MEMORY=$MEMORY GPUS=$GPUS"
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 1; }
[ -z "${INSTALL:-}" ] || bash "$here/install.sh"
# shellcheck source=tests/cluster/processes.sh
. "$here/processes.sh"

write_files() {
  mkdir -p "$BASE"/{run,log,spool,state,etc,munge,pids,dev,ssh,bin}
  chmod 755 "$BASE" "$BASE"/*
  local i gres=''
  {
    echo "127.0.0.1 localhost"
    echo "10.78.0.1 login"
    # The mapped address too: torch looks up the name of a peer by it.
    for i in $(seq "$NODES"); do printf '%s n%d\n' "10.78.0.$((10 + i))" "$i" "::ffff:10.78.0.$((10 + i))" "$i"; done
  } >"$BASE/etc/hosts"
  if [ "$GPUS" -gt 0 ]; then
    for i in $(seq "$GPUS"); do
      mknod "$BASE/dev/fakegpu$i" c 1 3
      echo "NodeName=n[1-$NODES] Name=gpu File=$BASE/dev/fakegpu$i" >>"$BASE/etc/gres.conf"
    done
    gres="Gres=gpu:$GPUS"
  fi
  # cred_expire is also how long a requeued job waits before it starts again (default 120 s). config_overrides lets
  # nodes claim more processors than the machine has. No cgroups: ProctrackType, TaskPlugin, JobAcctGatherType.
  cat >"$BASE/etc/slurm.conf" <<C
ClusterName=opdds
SlurmctldHost=login(10.78.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$BASE/munge/sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=15
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
StateSaveLocation=$BASE/state
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/slurmd.%n.pid
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
${gres:+GresTypes=gpu}
NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEMORY $gres
$(for i in $(seq "$NODES"); do echo "NodeName=n$i NodeAddr=10.78.0.$((10 + i))"; done)
PartitionName=debug Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP
C
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$BASE/etc/cgroup.conf"
  # ssh with its own keys and configuration, first on PATH: nothing in ~/.ssh is read or written.
  ssh-keygen -q -t ed25519 -N '' -f "$BASE/ssh/hostkey"
  ssh-keygen -q -t ed25519 -N '' -f "$BASE/ssh/id"
  cat >"$BASE/ssh/sshd_config" <<C
Port 22
HostKey $BASE/ssh/hostkey
AuthorizedKeysFile $BASE/ssh/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
C
  cat >"$BASE/ssh/config" <<C
Host login n*
  User root
  IdentityFile $BASE/ssh/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
C
  printf '#!/bin/sh\nexec /usr/bin/ssh -F %s "$@"\n' "$BASE/ssh/config" >"$BASE/bin/ssh"
  chmod 755 "$BASE/bin/ssh"
  cat >"$BASE/env.sh" <<C
export SLURM_CONF=$BASE/etc/slurm.conf OPD_DS_CLUSTER=$BASE PATH=$BASE/bin:\$PATH
export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="-F $BASE/ssh/config"
on() {  # NODE COMMAND...
  local pid
  read -r pid _ <"\$OPD_DS_CLUSTER/pids/\$1" || return 99
  shift
  nsenter -t "\$pid" -n -u -m -p -w"\$PWD" -- "\$@"
}
C
}

start_munge() {  # one for all nodes: a unix socket does not know network namespaces
  dd if=/dev/urandom of="$BASE/munge/key" bs=128 count=1 status=none
  chmod 400 "$BASE/munge/key"
  munged --key-file="$BASE/munge/key" --socket="$BASE/munge/sock" --pid-file="$BASE/munge/pid" \
    --log-file="$BASE/munge/log" --seed-file="$BASE/munge/seed"
  wait_until 5 test -s "$BASE/munge/pid" -a -S "$BASE/munge/sock"
  record munged "$(cat "$BASE/munge/pid")"
}

start_node() {  # NAME: its process 1 does nothing but live; all else on the node dies with it
  local parent child
  rm -f "$BASE/run/ready.$1"
  # shellcheck disable=SC2016
  setsid unshare -n -u -m -p -f --kill-child --mount-proc bash -c '
    hostname "$1"; ip link set lo up
    mount --bind "$2/etc/hosts" /etc/hosts; mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    touch "$2/run/ready.$1"; trap : CHLD; while :; do sleep 86400 & wait $!; done' node "$1" "$BASE" \
    </dev/null >/dev/null 2>>"$BASE/log/$1.log" &
  parent=$!
  wait_until 5 test -e "$BASE/run/ready.$1" || { cat "$BASE/log/$1.log"; return 1; }
  child=$(cut -d' ' -f1 "/proc/$parent/task/$parent/children")
  record "$1" "$child"
  disown "$parent"
}

in_network_of() { local pid; read -r pid _ <"$BASE/pids/$1"; shift; nsenter -t "$pid" -n -- "$@"; }

start_login() {
  start_node login
  in_network_of login ip link add obds0 type bridge
  in_network_of login ip addr add 10.78.0.1/24 dev obds0
  in_network_of login ip link set obds0 up
}

start_compute() {  # NUMBER
  local name=n$1 pid
  start_node "$name"
  read -r pid _ <"$BASE/pids/$name"
  in_network_of login ip link delete "v$1" 2>/dev/null || true  # of the node that crashed, if the kernel still has it
  in_network_of login ip link add "v$1" type veth peer name eth0 netns "$pid"
  in_network_of login ip link set "v$1" master obds0 up
  in_network_of "$name" ip addr add "10.78.0.$((10 + $1))/24" dev eth0
  in_network_of "$name" ip link set eth0 up
  mkdir -p /run/sshd "$BASE/spool/$name"
  on "$name" /usr/sbin/sshd -f "$BASE/ssh/sshd_config" -E "$BASE/log/sshd.$name.log"
  on "$name" slurmd -N "$name" -f "$SLURM_CONF"
}

idle_nodes() { on login timeout 5 sinfo -h -N -t idle,mix,alloc -o %N 2>/dev/null | sort -u | wc -l; }
all_up() { [ "$(idle_nodes)" = "$NODES" ]; }

if [ ! -s "$BASE/shape" ] || [ "$(cat "$BASE/shape")" != "$shape" ] || ! lives munged || ! lives login; then
  BASE=$BASE bash "$here/down.sh"
  rm -rf "${BASE:?}"
  write_files
  # shellcheck disable=SC1091
  . "$BASE/env.sh"
  start_munge
  start_login
  on login slurmctld -c -f "$SLURM_CONF"
  echo "$shape" >"$BASE/shape"
fi
# shellcheck disable=SC1091
. "$BASE/env.sh"
for i in $(seq "$NODES"); do lives "n$i" || start_compute "$i"; done
wait_until 30 all_up || { echo "not all nodes came up:"; on login sinfo -N -l; tail -n 5 "$BASE"/log/*.log; exit 1; }
