#!/usr/bin/env bash
# All that a GPU machine can tell, within nine minutes: build, tests, benchmarks. Needs no network and installs nothing.
#   benchmarks/gpu_suite.sh                 every stage; JSON and logs under ${OUT:-benchmarks/results}
#   benchmarks/gpu_suite.sh --only tests    some of them
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_suite.py "$@"
