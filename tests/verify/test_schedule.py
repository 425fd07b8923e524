"""Property schedule: every tile once, for grids that go round, and each way to lose or repeat one."""

from itertools import product

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import barrier_kernels as kernels
from tests.verify import samples
from verify import extract
from verify.engine import check
from verify.properties.coverage import Coverage
from verify.properties.refinement import Refinement
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


class RefinementAlone(Refinement):
    """Likewise."""

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


def some_tiles(which):
    """A kernel over tiles that writes all of them, or none, as a shape or an element says."""
    m = T.dynamic("m")

    @T.prim_func
    def some_tiles_kernel(flag: T.Tensor[(1,), T.int32], y: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(TWO_ROWS, threads=128) as block:
            for wave in T.serial(all_tiles(T.ceildiv(m, ROW_TILE), block, TWO_ROWS)):
                row, column = by_rows(block, wave, 0, TWO_ROWS)
                if {"shape": m > 100, "data": flag[0] > 0, "all": m >= 0}[which]:
                    for i, j in T.Parallel(ROW_TILE, COLUMN_TILE):
                        y[row * ROW_TILE + i, column * COLUMN_TILE + j] = T.cast(flag[0], T.float32)

    return some_tiles_kernel


@pytest.mark.parametrize(
    ("which", "expected"),
    [("all", Verdict.PROVED), ("shape", Verdict.REFUTED), ("data", Verdict.UNKNOWN)],
)
def test_a_condition_that_speaks_of_no_tile_leaves_all_of_them_out(which, expected):
    assert [r.verdict for r in results_of(some_tiles(which))] == [expected, expected]


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


def in_panels(order, uses_before=False, row_tile=ROW_TILE):
    """Return a kernel whose blocks go over its tiles in panels."""
    m = T.dynamic("m")

    @T.prim_func
    def panels_kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        first: T.Tensor[(m,), T.float32],
        y: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, row_tile), ACROSS, threads=128) as (row, column):
            tile = T.alloc_fragment((row_tile, COLUMN_TILE), T.float32)
            if uses_before:
                first[row * row_tile] = 0.0
            T.use_swizzle(10, order=order)
            T.copy(x[row * row_tile, column * COLUMN_TILE], tile)
            for i, j in T.Parallel(row_tile, COLUMN_TILE):
                tile[i, j] = tile[i, j] * 2.0
            T.copy(tile, y[row * row_tile, column * COLUMN_TILE])

    return panels_kernel


def panels_result(prim_func, contract=ROWS):
    extracted = extract.extract(prim_func)
    report = check("kernel", "variant", extracted, contract, {}, properties=[Alone(), RefinementAlone()])
    return report.properties


@pytest.mark.parametrize("order", ["row", "column"])
def test_blocks_in_panels(order):
    """Both levels speak of the place that a block takes; places and blocks are one to one."""
    for result in panels_result(in_panels(order)):
        assert result.verdict is Verdict.PROVED, result


def test_panels_of_more_blocks_than_a_word_counts():
    contract = Contract(("0 <= m", "m <= 2147483647"))
    schedule, _ = panels_result(in_panels("row", row_tile=1), contract)
    assert schedule.verdict is Verdict.REFUTED
    schedule, _ = panels_result(in_panels("row"), contract)
    assert schedule.verdict is Verdict.PROVED


def test_a_block_that_takes_its_place_too_late():
    schedule, _ = panels_result(in_panels("row", uses_before=True))
    assert schedule.verdict is Verdict.UNSUPPORTED


def place(block, width, along, across):
    """Return where the generated code puts block number `block`, as its template says."""
    panel, offset = divmod(block, width * along)
    panels = -(-along * across // (width * along))
    rows = width if panel + 1 < panels else (along * across - panel * width * along) // along
    turned, row = divmod(offset, rows)
    return (along - 1 - turned if panel % 2 else turned), row + panel * width


@pytest.mark.parametrize("width", [1, 3, 10])
def test_the_inverse_that_is_proved_is_that_of_the_code(width):
    for along, across in product(range(1, 9), range(1, 35)):
        places = [place(block, width, along, across) for block in range(along * across)]
        assert sorted(places) == sorted(product(range(along), range(across)))
        for block, (column, row) in enumerate(places):
            panel, in_panel = divmod(row, width)
            rows = min(width, across - panel * width)
            turned = along - 1 - column if panel % 2 else column
            assert panel * width * along + turned * rows + in_panel == block


def test_tiles_that_a_condition_on_the_shape_leaves_out_are_missed():
    m, above = T.dynamic("m"), 100

    @T.prim_func
    def large_alone(x: T.Tensor[(m, COLUMNS), T.float32], y: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(TWO_ROWS, threads=128) as block:
            tile = T.alloc_fragment((ROW_TILE, COLUMN_TILE), T.float32)
            for wave in T.serial(all_tiles(T.ceildiv(m, ROW_TILE), block, TWO_ROWS)):
                row, column = by_rows(block, wave, T.ceildiv(m, ROW_TILE), TWO_ROWS)
                T.copy(x[row * ROW_TILE, column * COLUMN_TILE], tile)
                if m > above:
                    T.copy(tile, y[row * ROW_TILE, column * COLUMN_TILE])

    for result in results_of(large_alone):
        assert result.verdict is Verdict.REFUTED, result.name
        assert "computed by no block" in result.findings[0].message
