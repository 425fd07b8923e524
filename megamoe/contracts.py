"""placeholder"""

from megamoe.config import Config


def clauses(which: str, c: Config) -> tuple[str, ...]:
    g = c.geometry
    experts = c.num_ranks * c.num_experts
    if which == "plan":
        return (f"-1 <= topk_idx < {experts}",)
    return (
        f"0 <= firsts <= {c.pool_blocks}",
        f"0 <= block_expert < {c.num_experts}",
        f"-1 <= row_source < {c.num_ranks * c.tokens}",
        f"-1 <= row_target < {c.num_ranks * c.topk * c.tokens}",
    )
