"""How much shared memory a block has."""

MAX_SHARED_BYTES = 227 * 1024  # of a block on sm_90, what mbarriers and alignment take among it
