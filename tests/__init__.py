"""Tests. Those that start processes have more threads than a machine has cores, so threads sleep while they wait."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
