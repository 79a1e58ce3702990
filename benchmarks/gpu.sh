#!/bin/sh
# klimb on one GPU beside its ceilings and beside TRL, in under 10 minutes; --try: a tiny shape on the CPU.
set -eu
here=$(dirname "$0")
PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$here/gpu.py" "$@"
