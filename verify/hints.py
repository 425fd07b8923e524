"""What to look at first when a property is REFUTED."""

_HINTS = {
    "contract": "no shape satisfies all clauses at once: one of them contradicts another, or an assumption",
    "extraction": "the kernel uses an operation without a registered meaning",
    "overflow": "bound the dim in the contract, or compute the address in int64",
    "alignment": "check tile widths and offsets in bytes, and the limits of descriptors and launch",
    "bounds": "guard the access, or bound the dim or the data in the contract",
    "refinement": "the compiled address or value is not the one that the program states: rewrite it",
    "coverage": "compare the launch grid and the guards of the store with the tensor's extent",
    "race": "put a barrier, a wait or a proxy fence between the two accesses, also from round to round",
    "barrier": "move the barrier out of the branch, or give it the number of threads that take the branch",
    "mbarrier": "compare init count, arrivals, expected bytes, parity; let in no warp that only waits",
    "init": "write every element before it is read: clear the buffer, or guard the read",
    "determinism": "combine partial results in a fixed order instead of by atomics",
    "batch_invariance": "choose splits, chunks and tiles by what does not depend on the batch",
    "layout": "give producer and consumer the same layout, and let it be one-to-one",
    "banks": "swizzle or pad the shared tile",
    "schedule": "check that tile ids and tiles are one-to-one, and the last partial wave",
    "format": "check the bit trick at subnormals, zero, the largest value and nan",
}


def hint(prop: str) -> str:
    """Return one line of advice for a property; empty for one that has none."""
    return _HINTS.get(prop, "")
