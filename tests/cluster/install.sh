#!/usr/bin/env bash
# Debian packages of the miniature SLURM cluster. Anywhere else its tests are skipped, which is no error.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2 openssh-server openssh-client pdsh)

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no root, or no Debian: the cluster tests will be skipped"
  exit 0
fi
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing ${missing[*]}"
if [ ! -e /usr/sbin/policy-rc.d ]; then  # keeps Debian from starting the daemons
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod 755 /usr/sbin/policy-rc.d
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >/tmp/opd-ds-apt.log 2>&1; then
  tail -n 5 /tmp/opd-ds-apt.log
  echo "apt-get failed: the cluster tests will be skipped"
fi
