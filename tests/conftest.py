"""One thread a worker: two workers with two threads each would fight over two cores. Set before torch is imported."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Half of hypothesis's own number; properties that need more say so. `--hypothesis-profile=default` tries all of it.
settings.register_profile("short", max_examples=50)
settings.load_profile("short")

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: those that are to be
# interrupted by a test would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
