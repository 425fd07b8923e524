"""Property schedule: every tile once, for grids that go round, and each way to lose or repeat one."""

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import barrier_kernels as kernels
from tests.verify import samples
from verify import extract
from verify.engine import check
from verify.properties.coverage import Coverage
from verify.properties.schedule import Schedule
from verify.verdict import Verdict

ROWS = Contract(("0 <= m", "m <= 65536"))
COLUMNS, ROW_TILE, COLUMN_TILE = 1024, 32, 128
ACROSS = COLUMNS // COLUMN_TILE
BLOCKS = 12  # neither a multiple of a row of tiles nor a part of one
TWO_ROWS = 2 * ACROSS


class Alone(Schedule):
    """The property without those it rests on."""

    depends = ()


class CoverageAlone(Coverage):
    """Likewise."""

    depends = ()


def results_of(prim_func):
    extracted = extract.extract(prim_func)
    report = check("kernel", "variant", extracted, ROWS, {}, properties=[Alone(), CoverageAlone()])
    return report.properties


def double(tile_of, rounds_of, blocks=BLOCKS):
    """Return a kernel whose blocks go over tiles: `tile_of` gives row and column."""
    m = T.dynamic("m")

    @T.prim_func
    def double_kernel(x: T.Tensor[(m, COLUMNS), T.float32], y: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(blocks, threads=128) as block:
            tile = T.alloc_fragment((ROW_TILE, COLUMN_TILE), T.float32)
            for wave in T.serial(rounds_of(T.ceildiv(m, ROW_TILE), block, blocks)):
                row, column = tile_of(block, wave, T.ceildiv(m, ROW_TILE), blocks)
                T.copy(x[row * ROW_TILE, column * COLUMN_TILE], tile)
                for i, j in T.Parallel(ROW_TILE, COLUMN_TILE):
                    tile[i, j] = tile[i, j] * 2.0
                T.copy(tile, y[row * ROW_TILE, column * COLUMN_TILE])

    return double_kernel


def by_rows(block, wave, rows, blocks):
    return (wave * blocks + block) // ACROSS, (wave * blocks + block) % ACROSS


def by_columns(block, wave, rows, blocks):
    return (wave * blocks + block) % rows, (wave * blocks + block) // rows


def all_tiles(rows, block, blocks):
    return T.ceildiv(rows * ACROSS - block, blocks)


@pytest.mark.parametrize(("tile_of", "blocks"), [(by_rows, TWO_ROWS), (by_columns, BLOCKS)])
def test_each_tile_is_computed_once(tile_of, blocks):
    schedule, coverage = results_of(double(tile_of, all_tiles, blocks))
    assert schedule.verdict is Verdict.PROVED, schedule.findings
    assert coverage.verdict is Verdict.PROVED, coverage.findings
    assert schedule.obligations >= 5


def test_pipelined_kernels_over_tiles_are_proved():
    schedule, coverage = results_of(kernels.waves())
    assert (schedule.verdict, coverage.verdict) == (Verdict.PROVED, Verdict.PROVED)


@pytest.mark.slow
def test_the_compilers_persistent_kernels_are_proved():
    schedule, coverage = results_of(kernels.persistent())
    assert (schedule.verdict, coverage.verdict) == (Verdict.PROVED, Verdict.PROVED)


def test_a_plain_grid_is_its_own_schedule():
    schedule, _ = results_of(samples.scale_rows())
    assert schedule.verdict is Verdict.PROVED
    assert "each block of the launch is one tile" in schedule.notes[0]


def whole_rounds(rows, block, blocks):
    """Return a trip count that leaves the last, partial round out."""
    return rows * ACROSS // blocks


def one_more_round(rows, block, blocks):
    """Return a trip count with which the last blocks start over."""
    return T.ceildiv(rows * ACROSS, blocks) + 1


def every_second(block, wave, rows, blocks):
    """Return tiles of which odd ones are never reached."""
    return (wave * blocks + block) * 2 // ACROSS, (wave * blocks + block) * 2 % ACROSS


def overlapping(block, wave, rows, blocks):
    """Return tiles that neighbouring rounds share."""
    return (wave * (blocks - 1) + block) // ACROSS, (wave * (blocks - 1) + block) % ACROSS


def one_column_short(block, wave, rows, blocks):
    return (wave * blocks + block) // (ACROSS - 1), (wave * blocks + block) % (ACROSS - 1)


@pytest.mark.parametrize(
    ("tile_of", "rounds_of", "says"),
    [
        (by_rows, whole_rounds, "computed by no block"),
        (by_rows, one_more_round, "is no tile"),
        (every_second, all_tiles, "is no tile"),
        (overlapping, all_tiles, "computed twice"),
        (one_column_short, all_tiles, "is no tile"),
    ],
)
def test_a_tile_lost_or_repeated_is_refuted_at_a_shape(tile_of, rounds_of, says):
    schedule, _ = results_of(double(tile_of, rounds_of))
    assert schedule.verdict is Verdict.REFUTED, schedule.findings
    finding = next(f for f in schedule.findings if f.verdict is Verdict.REFUTED)
    assert says in finding.message
    example = finding.counterexample
    assert example is not None
    ROWS.check("kernel", **example.shape)
    assert example.values["buffer"] == "y"
