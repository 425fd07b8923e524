"""What the fused kernel's caller promises of its tensors, for the verifier's properties.

What it says of the plan's tensors is what `plan_kernel` writes: claim `promises` of the suites `plan...`.
"""

from megamoe.config import Config

# What CTAs write for each other within a launch.
EXCHANGED = (
    "x_ring",
    "x_ring_scale",
    "h_ring",
    "h_ring_scale",
    "combine",
    "dispatched",
    "l1_done",
    "l2_done",
    "wide_ring",
    "widened",
    "grid_word",
    "signals",
    "epochs",
)
IN_PLACE = ("grid_word", "signals", "epochs", "status")  # words that outlive a launch


def clauses(config: Config) -> tuple[str, ...]:
    """Return the contract of a kernel, clause by clause, as `Contract` takes them."""
    c = config
    return (
        f"0 <= firsts <= {c.pool_blocks}",
        f"0 <= block_expert < {c.num_experts}",
        f"-1 <= row_source < {c.num_ranks * c.tokens}",
        f"-1 <= row_target < {c.num_ranks * c.combine_rows}",
        "distinct(row_target)",
    )


def bank_limit(config: Config) -> int | None:
    """Return the greatest degree of a bank conflict; None where the verifier does not decide all accesses.

    Those who widen find their codes and offsets by indices that are loaded.
    """
    return None if config.widened else 1
