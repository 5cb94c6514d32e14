#!/bin/bash
# Unpacks Debian's or Ubuntu's Slurm into .slurm at the top of the checkout, for tests/test_slurm.py; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ ! -d .slurm ] || exit 0
command -v apt-get >/dev/null || { echo "error: Slurm is fetched by apt-get, which this machine has not" >&2; exit 1; }
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins libmunge2 libhwloc15)
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
fetch() { (cd "$temp" && apt-get download -q "${packages[@]}"); }
fetch || { apt-get update -q && fetch; } # without lists of packages, or with old ones
for package in "$temp"/*.deb; do dpkg-deb -x "$package" "$temp/slurm"; done
mv "$temp/slurm" .slurm
