"""Students of tests/model, and the plugin as its users have it: one folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "model"), str(ROOT / "megatron_plugin")]
