"""What the tests of a GPU ask for exists: the kernels of `test_virtual` are described here without one."""

import pytest

from tests.megamoe import test_virtual

FORMS = {f"{ranks} {name}": (ranks, changes) for ranks in test_virtual.OPTION_RANKS
         for name, changes in test_virtual.OPTIONS.items()}  # fmt: skip
FORMS |= {f"{ranks}": (ranks, {}) for ranks in test_virtual.RANKS} | {"lost": (2, test_virtual.LOST)}


@pytest.mark.parametrize(("ranks", "changes"), FORMS.values(), ids=FORMS.keys())
def test_kernel_is_described(ranks, changes):
    c = test_virtual.config(ranks, **changes)
    assert (c.num_ranks, c.tokens * ranks) == (ranks, test_virtual.TOKENS)
