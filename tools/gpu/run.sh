#!/usr/bin/env bash
# Checks and times the kernels on the GPU of this machine: tools/gpu/run.sh FOLDER [--minutes 10]
# Without a GPU, --rehearse runs the same at tiny sizes and measures nothing.
# Needs Python, torch, Triton and numpy; no network, and nothing installed from this checkout.
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tools.gpu.run "$@"
