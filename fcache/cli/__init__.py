"""The command line: parse, call one function, render. Nothing heavier than click is imported before a command runs."""

import os

# Read once, when torch loads its OpenMP: waiting threads sleep. Spinning ones slow a busy machine down many times
# (docs/design/threads.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fcache.cli.app import main as main
