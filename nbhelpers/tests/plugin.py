"""Loaded by pytest before anything else: quick notebooks, no windows, and no fight over CPU threads."""

import os

os.environ.setdefault("NB_QUICK", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Waiting threads must sleep: two spinning OpenMP pools on two cores run many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
