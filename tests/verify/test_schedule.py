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
COLUMNS, ROW_TILE, COLUMN_TILE, BLOCKS = 1024, 32, 128, 12
ACROSS = COLUMNS // COLUMN_TILE


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


def double(tile_of, rounds_of):
    """Return a kernel whose blocks go over tiles: `tile_of(block, wave, rows)` gives row and column."""
    m = T.dynamic("m")

    @T.prim_func
    def double_kernel(x: T.Tensor[(m, COLUMNS), T.float32], y: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(BLOCKS, threads=128) as block:
            tile = T.alloc_fragment((ROW_TILE, COLUMN_TILE), T.float32)
            for wave in T.serial(rounds_of(T.ceildiv(m, ROW_TILE), block)):
                row, column = tile_of(block, wave, T.ceildiv(m, ROW_TILE))
                T.copy(x[row * ROW_TILE, column * COLUMN_TILE], tile)
                for i, j in T.Parallel(ROW_TILE, COLUMN_TILE):
                    tile[i, j] = tile[i, j] * 2.0
                T.copy(tile, y[row * ROW_TILE, column * COLUMN_TILE])

    return double_kernel


def by_rows(block, wave, rows):
    return (wave * BLOCKS + block) // ACROSS, (wave * BLOCKS + block) % ACROSS


def by_columns(block, wave, rows):
    return (wave * BLOCKS + block) % rows, (wave * BLOCKS + block) // rows


def all_tiles(rows, block):
    return T.ceildiv(rows * ACROSS - block, BLOCKS)


@pytest.mark.parametrize("tile_of", [by_rows, by_columns])
def test_each_tile_is_computed_once(tile_of):
    schedule, coverage = results_of(double(tile_of, all_tiles))
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


def whole_rounds(rows, block):
    """Return a trip count that leaves the last, partial round out."""
    return rows * ACROSS // BLOCKS


def one_more_round(rows, block):
    """Return a trip count with which the last blocks start over."""
    return T.ceildiv(rows * ACROSS, BLOCKS) + 1


def every_second(block, wave, rows):
    """Return tiles of which odd ones are never reached."""
    return (wave * BLOCKS + block) * 2 // ACROSS, (wave * BLOCKS + block) * 2 % ACROSS


def overlapping(block, wave, rows):
    """Return tiles that neighbouring rounds share."""
    return (wave * (BLOCKS - 1) + block) // ACROSS, (wave * (BLOCKS - 1) + block) % ACROSS


def one_column_short(block, wave, rows):
    return (wave * BLOCKS + block) // (ACROSS - 1), (wave * BLOCKS + block) % (ACROSS - 1)


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
