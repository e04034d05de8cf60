"""What an artifact can be exported for; torch-free, so that a list of it costs nothing.

Place in the path: **megatron**; run offers it to `vpstore export --to`.

Example:
    >>> sorted(TARGETS)
    ['megatron', 'megatron-plugin']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# The target whose checkpoint has the shared expert's output bias in the experts' biases.
FOLDING: Final = "megatron"
TARGETS: Final[Mapping[str, str]] = {
    FOLDING: "torch_dist for the public stack and for stock Megatron with the plugin; the shared bias is folded",
    "megatron-plugin": "torch_dist for stock Megatron with the plugin alone; every tensor bit for bit",
}
