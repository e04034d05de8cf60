"""One thread a worker: two workers with two threads each would fight over two cores. Set before torch is imported."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Half of hypothesis's own number; properties that need more say so. `--hypothesis-profile=default` tries all of it.
settings.register_profile("short", max_examples=50)
settings.load_profile("short")
