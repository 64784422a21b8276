#!/usr/bin/env bash
# One command on a machine with a GPU: build, tests, sanitizers, benchmarks, a short table and one
# JSON file. bench/gpu_check.py has the stages and the options; PYTHON names the interpreter.
#   bench/gpu_check.sh             all of it, in less than ten minutes
#   bench/gpu_check.sh --dry-run   without a GPU, what can be rehearsed of it
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
