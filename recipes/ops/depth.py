"""Which old layer goes where when a model grows deeper, and whom each inserted layer copies.

Place in the path: recipe -> **ops**. Pure integers; expand_depth turns the answer into tensors.
Invariants: layers are 1-based; layer l is global if l % global_every == 0; a valid map is strictly increasing, keeps
every layer's role and leaves layer 1, whose values all later layers read, at 1. Under these conditions, and with the
two output projections of every inserted layer zero, the deeper model computes the old one's logits bit for bit.

Example:
    >>> depth_map(4, 12, global_every=4)
    (1, 5, 9, 12)
"""

from __future__ import annotations

from collections.abc import Sequence

from vpstore.errors import RecipeRefused


def depth_map(old_layers: int, new_layers: int, *, global_every: int) -> tuple[int, ...]:
    """Spread the old layers over the new depth without changing a layer's role.

    Global number g of O goes to global number round(g * N / O) of N (halves round up); between two old globals the
    locals are spread evenly over the local places there, the first directly behind the global before it.

    Args:    old_layers, new_layers: both multiples of global_every, new_layers >= old_layers > 0.
    Returns: m with m[i - 1] = new place of old layer i; 28 -> 80 gives the project's map.
    Raises:  RecipeRefused: a depth that does not hold whole blocks, or a new depth below the old one.
    Source:  Wu et al. 2024, arXiv:2401.02415 (LLaMA Pro), made role-preserving.
    """
    _require_blocks(old_layers, new_layers, global_every)
    old_blocks, new_blocks = old_layers // global_every, new_layers // global_every
    locals_per_block = global_every - 1
    places: list[int] = []
    start = 0  # new blocks before the current one
    for block in range(1, old_blocks + 1):
        end = (2 * block * new_blocks + old_blocks) // (2 * old_blocks)
        span = end - start
        free = [start * global_every + n for n in range(1, span * global_every) if n % global_every]
        places += [free[j * span] for j in range(locals_per_block)]
        places.append(end * global_every)
        start = end
    return tuple(places)


def _require_blocks(old_layers: int, new_layers: int, global_every: int) -> None:
    whole = old_layers > 0 and old_layers % global_every == 0 and new_layers % global_every == 0
    if not whole or new_layers < old_layers:
        raise RecipeRefused(
            "no role-preserving map exists between these depths",
            where=f"depth {old_layers} -> {new_layers}",
            expected=f"two multiples of {global_every}, the new one not below the old one",
            found=f"{old_layers} and {new_layers}",
            next_step="change num_layers in the object's or the profile's TOML",
        )


def require_valid_map(places: Sequence[int], *, old_layers: int, new_layers: int, global_every: int) -> None:
    """Hold a depth map against the conditions under which the logits are preserved.

    Args:    places: places[i - 1] = new place of old layer i.
    Raises:  RecipeRefused: names the first condition that is broken.
    """
    broken = _first_broken(places, old_layers, new_layers, global_every)
    if broken is None:
        return
    condition, found = broken
    raise RecipeRefused(
        f"the depth map breaks the condition: {condition}",
        where=f"depth {old_layers} -> {new_layers}",
        expected=condition,
        found=found,
        next_step="leave the map out to use the role-preserving one, or mend this entry",
    )


def _first_broken(places: Sequence[int], old: int, new: int, every: int) -> tuple[str, str] | None:
    if len(places) != old:
        return "one place for each old layer", f"{len(places)} places for {old} layers"
    for layer, place in enumerate(places, start=1):
        if not 1 <= place <= new:
            return f"every place within 1..{new}", f"m({layer}) = {place}"
    if places[0] != 1:
        return "m(1) = 1, because layer 1 publishes the values of the value residual", f"m(1) = {places[0]}"
    for layer in range(1, old):
        if places[layer] <= places[layer - 1]:
            return "strictly increasing", f"m({layer}) = {places[layer - 1]}, m({layer + 1}) = {places[layer]}"
    for layer, place in enumerate(places, start=1):
        if (layer % every == 0) != (place % every == 0):
            role = "global" if layer % every == 0 else "local"
            return "every layer keeps its role", f"{role} layer {layer} goes to {place}"
    return None


def inserted_layers(places: Sequence[int], new_layers: int) -> tuple[int, ...]:
    """New layers that no old layer went to, ascending."""
    taken = set(places)
    return tuple(layer for layer in range(1, new_layers + 1) if layer not in taken)


def source_layers(places: Sequence[int], new_layers: int, *, global_every: int) -> tuple[int, ...]:
    """The old layer whose tensors each new layer takes.

    A layer that was moved takes its own; an inserted one copies the nearest old layer of its role, measured in new
    places; of two equally near ones, the lower.

    Args:    places: a valid map.
    Returns: s with s[n - 1] = old layer (1-based) for new layer n.
    Raises:  RecipeRefused: no old layer has the role that an inserted layer needs.
    """
    chosen: list[int] = []
    for new in range(1, new_layers + 1):
        role = new % global_every == 0
        same_role = [old for old, place in enumerate(places, start=1) if (place % global_every == 0) == role]
        if not same_role:
            raise RecipeRefused(
                "an inserted layer has nothing to copy",
                where=f"new layer {new}",
                expected="an old layer of the same role",
                found="none",
                next_step="expand a model that has both roles",
            )
        chosen.append(min(same_role, key=lambda old: (abs(places[old - 1] - new), old)))
    return tuple(chosen)
