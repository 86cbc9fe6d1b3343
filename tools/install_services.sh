#!/usr/bin/env bash
# Installs the programs that tests use and that the package index does not have: a real Memcached and
# Prometheus, promtool for its rules, systemd's checker of units; and Redis where it has no package.
# Called by `make services`, which puts the virtual environment first on PATH. Without them those tests are skipped, and say so.
set -euo pipefail
needed=(redis-server:redis-server memcached:memcached promtool:prometheus systemd-analyze:systemd)
missing=()
for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if ((${#missing[@]})); then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
fi
