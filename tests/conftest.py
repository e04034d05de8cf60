"""One thread a worker: two workers with two threads each would fight over two cores. Set before torch is imported."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Generator
from pathlib import Path

# Rewriting the assertions takes most of the collection, hypothesis's own among them: it is kept even where Python keeps
# nothing.
sys.dont_write_bytecode = False

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402 - its modules are rewritten, too

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Rows over the whole vocabulary are hundreds of megabytes that come and go: huge pages spare most of the page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# dvc's hydra brings a plugin that takes a second to import. Each worker imports only the plugins that are used here.
os.environ.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
os.environ.setdefault("PYTEST_PLUGINS", "xdist.plugin,pytest_timeout,_hypothesis_pytestplugin")

# What tests write lies in memory where there is room: the store fsyncs every file, and so do states of training.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Half of hypothesis's own number; properties that need more say so. `--hypothesis-profile=default` tries all of it.
# No deadlines: how long an example takes is up to what else this machine does.
settings.register_profile("short", max_examples=50, deadline=None)
settings.load_profile("short")

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: those that are to be
# interrupted by a test would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as `nohup` leaves it: commands rightly go on ignoring it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Importing and collecting make much that stays: looking through it for garbage finds none and takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
