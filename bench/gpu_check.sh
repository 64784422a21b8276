#!/usr/bin/env bash
# Runs everything on a machine with a GPU: build, tests, sanitizers, benchmarks; prints a short table
# and writes one JSON file. bench/gpu_check.py describes the stages and options; PYTHON names the
# interpreter.
#   bench/gpu_check.sh             all stages, in less than ten minutes
#   bench/gpu_check.sh --dry-run   rehearses the stages without a GPU, as far as possible
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
