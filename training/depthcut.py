"""A checkpoint with sixteen depth steps, cut to the eight that the agent needs.

PersonaPlex predicts the user's codebooks too (steps 8 to 15), and nobody plays them. The depth
transformer is causal over codebooks, so without those steps the agent's logits stay what they
were (the published server and a cut model gave the same tokens). What goes:

    linears, depformer_norms             one a step: 0-7 stay
    depformer_emb                        one a step but the last: 0-6 stay
    depformer_in, gating, in/out_projs   one a weight of the schedule, else one a step: 0-7 stay
    in_proj_weight, out_proj.weight      the same, one below the other: the upper half stays

Each kept tensor is a first part of the one in the file, so a cut moves nothing and renames
nothing. Pure: configs and shapes, no files.
"""

from __future__ import annotations

import re
from typing import Any

from duplex.errors import MergeError
from duplex.streams import CODEBOOKS

WIDE_DEP_Q = 2 * CODEBOOKS  # PersonaPlex, as published
_BY_STEP = re.compile(r"(?:linears|depformer_norms)\.(\d+)\..+")
_BY_EMBEDDING = re.compile(r"depformer_emb\.(\d+)\..+")
_BY_INPUT = re.compile(r"depformer_in\.(\d+)\..+")
_BY_WEIGHT = re.compile(
    r"depformer\.layers\.\d+\.(?:gating|self_attn\.(?:in|out)_projs)\.(\d+)\..+"
)
_FUSED = re.compile(
    r"depformer\.layers\.\d+\.self_attn\.(?:in_proj_weight|in_proj\.weight|out_proj\.weight)"
)


def is_wide(config: dict[str, Any]) -> bool:
    """Whether a checkpoint has sixteen depth steps, as PersonaPlex has."""
    return config.get("dep_q", CODEBOOKS) == WIDE_DEP_Q


def cut_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` at dep_q 8. Delays stay: they count the rows of the input, which are the same.

    Raises:
        MergeError: it is not of a model with dep_q 16 whose first 8 codebooks are the agent's.
    """
    dep_q, n_q = config.get("dep_q", CODEBOOKS), config.get("n_q", WIDE_DEP_Q)
    if (dep_q, n_q) != (WIDE_DEP_Q, WIDE_DEP_Q):
        raise MergeError(
            f"a checkpoint to cut must have dep_q {WIDE_DEP_Q} and n_q {WIDE_DEP_Q}, found dep_q "
            f"{dep_q} and n_q {n_q}. "
            + ("It can be served as it is." if dep_q == CODEBOOKS else "Give PersonaPlex's.")
        )
    changes: dict[str, Any] = {"dep_q": CODEBOOKS}
    schedule = config.get("depformer_weights_per_step_schedule")
    if schedule is not None:
        changes["depformer_weights_per_step_schedule"] = list(schedule[:CODEBOOKS])
    widths = config.get("depformer_dim_feedforward")
    if isinstance(widths, list):
        changes["depformer_dim_feedforward"] = widths[: _num_weights(config, CODEBOOKS)]
    return config | changes


def cut_shapes(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a cut checkpoint: names and shapes of what is kept of `shapes`.

    Args:
        config: of the checkpoint before it is cut.

    Raises:
        MergeError: a fused tensor's rows are no multiple of the weights in it.
    """
    before, after = _num_weights(config, WIDE_DEP_Q), _num_weights(config, CODEBOOKS)
    limits = [(_BY_STEP, CODEBOOKS), (_BY_EMBEDDING, CODEBOOKS - 1), (_BY_WEIGHT, after)]
    if config.get("depformer_multi_linear"):
        schedule = config.get("depformer_weights_per_step_schedule")
        limits.append((_BY_INPUT, after if schedule else CODEBOOKS))
    kept = {}
    for name, shape in shapes.items():
        matches = [(m, limit) for pattern, limit in limits if (m := pattern.fullmatch(name))]
        if any(int(match[1]) >= limit for match, limit in matches):
            continue
        if _FUSED.fullmatch(name) and before != after:
            if shape[0] % before:
                raise MergeError(
                    f"{name}: must hold the weights of {before} depth steps, one below the other; "
                    f"its {shape[0]} rows are no multiple of that. config.json is of another model."
                )
            shape = (shape[0] // before * after, *shape[1:])
        kept[name] = shape
    return kept


def _num_weights(config: dict[str, Any], steps: int) -> int:
    """How many sets of depth weights the first `steps` steps use; 1 where all share one."""
    if not config.get("depformer_weights_per_step"):
        return 1
    schedule = config.get("depformer_weights_per_step_schedule")
    return max(schedule[:steps]) + 1 if schedule else steps
