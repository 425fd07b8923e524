"""Tiles and schedules of `fp8_gemm`, and which of them a batch takes.

A tile is used while its blocks run side by side, and of larger ones the one that packs a batch into rounds of
least cost (`rounds`). What was measured: docs/gemm/fp8.md.
"""

from dataclasses import dataclass, replace

from dsv4_kernels.gemm import fp8_gemm_async, fp8_gemm_tall, fp8_gemm_tiles, wide_tile
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS, ranges, rounds

BLOCK_K = 128  # channels a scale, and a partial sum
BLOCK_N = 128  # weight rows a scale
INSTRUCTION_M = 64  # rows of one wgmma
MAX_TOKENS = 2**31 - 256  # launch extents are int32
E8M0, F32 = "e8m0", "f32"  # kinds of scales


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: tokens a tile.
        block_n: weight rows a tile.
        num_stages: depth of the pipeline.
        weights_first: weights are the instruction's rows, up to four blocks of channels a stage; else
            tokens are.
        warpgroups: of consumers.
        form: of tokens first. "columns": the warpgroups share out the weight rows; "flight": tokens, see
            `fp8_gemm_async`; "wide": so, see `wide_tile`; "tiles", "runs", "tall": so, see `fp8_gemm_tiles`,
            `fp8_gemm_runs`, `fp8_gemm_tall`.
        blocks_per_sm: that run on a multiprocessor together; weights first only.
        tiles: that a block multiplies in turn; forms "tiles" and "runs" only.
        held_columns: of the output in shared memory, beside the ring; form "tiles" only.
    """

    block_m: int
    block_n: int
    num_stages: int
    weights_first: bool
    warpgroups: int
    form: str = "columns"
    blocks_per_sm: int = 1
    tiles: int = 1
    held_columns: int = 0


_Pairs = tuple[tuple[int, Config], ...]  # largest number of tokens, tile

_FEW = Config(block_m=16, block_n=64, num_stages=4, weights_first=True, warpgroups=1)
_FEW_OF_MANY = Config(16, 64, num_stages=2, weights_first=True, warpgroups=1, blocks_per_sm=2)
_ONE_WAVE = 4096  # weight rows up to which tiles of 32 are all resident
_WIDE = 16384  # weight rows from which narrow tiles only repeat the reads of x
_TILES = 4  # of a block, where weight rows are many
# Channels; costs of a round of several tiles a block and of as many rounds of one; tokens up to which they
# decide: 254 us against 266 at 32768 x 1024, 4096 tokens. Beyond, of 64 rounds and more, the three that may
# be added weigh little. Of 1536 channels one tile a block is the faster one there.
_SHORT_K, _SHORT_COST, _SHORT_TOKENS = 1024, (20, 21), 8192
_LONG_K, _LONG_COST, _LONG_TOKENS = 1536, (1, 1), 1024
# So, of n and k for which they were measured: tiles of a block, the most first, where they add no round;
# up to so many tokens.
_TURNS, _TURNS_TOKENS = {(7168, 2048): (7, 4, 2)}, 8192
# Tiles, and the most tokens for each: where its blocks run side by side, else comes the next.
_LADDER = (((64, 32), 128), ((64, 64), 256), ((128, 128), 1024))
# Tiles beside the ladder's, of n, k and scales for which they were measured faster than what comes next.
_ADDED = {
    (1536, 4096, E8M0): ((128, 64), (128, 128)),
    (4096, 7168, E8M0): ((128, 64),),
    (4096, 7168, F32): ((128, 64),),
    (4096, 8192, E8M0): ((128, 64),),
    (7168, 2048, E8M0): ((128, 128),),
    (7168, 16384, E8M0): ((128, 128),),
}
# So runs of tiles, of 64 or 128 tokens: tiles of a run, whose blocks then are one round.
_RUNS, _RUN_STAGES = {(32768, 1024): 2, (65536, 1536): 4}, 4
# So the tall tile. A round of it takes 0.9 of one of wide tiles, so it needs as few of them: batches of
# more than 6336 tokens never do.
_TALL, _TALL_STAGES, _TALL_TOKENS, _TALL_STEP = frozenset({(1536, 4096)}), 4, 8192, 64


def configs(n: int, k: int, scale: str) -> _Pairs:
    """Return (largest number of tokens, tile) pairs; every one adds in the same order."""
    few = _FEW_OF_MANY if n >= _WIDE else _FEW
    found = ((16, few), *_some(n, k, scale))
    return (*found, *_most(n, k, scale, found[-1][0]))


def _side_by_side(n: int, block_m: int, block_n: int) -> int:
    """Return the most tokens whose blocks are one round of multiprocessors."""
    return MULTIPROCESSORS // (n // block_n) * block_m


def _with_added(pairs: _Pairs, n: int, k: int, scale: str) -> _Pairs:
    """Return the pairs, and tiles of `_ADDED`: then each is used while its blocks are one round."""
    added = _ADDED.get((n, k, scale))
    if added is None:
        return pairs
    found = {c: min(limit, _side_by_side(n, c.block_m, c.block_n)) for limit, c in pairs}
    for tile in added:
        config = _flight(k, scale, *tile, deep=True)
        if config is not None:
            found[config] = _side_by_side(n, *tile)
    return tuple(sorted(((limit, config) for config, limit in found.items()), key=lambda pair: pair[0]))


def _most(n: int, k: int, scale: str, after: int) -> _Pairs:
    """Return the pairs for more than `after` tokens."""
    wide = _many(n, k, scale)
    if (n, k) in _TALL and scale == E8M0:
        return _tall_or(wide, n, after)
    if (n, k) in _TURNS and scale == E8M0:
        return _turns_or(wide, n, k, after)
    shares = fp8_gemm_tiles.shares(k, 1 if scale == E8M0 else 4, _TILES)
    if shares is None or k > _LONG_K or n < _WIDE or n % (_TILES * wide_tile.BLOCK_N):
        return ((MAX_TOKENS, wide),)
    tiles = replace(wide, num_stages=shares[0], form="tiles", tiles=_TILES, held_columns=shares[1])
    is_short = k <= _SHORT_K
    several, one = _SHORT_COST if is_short else _LONG_COST

    def choose(m: int) -> Config:
        blocks = m // wide_tile.BLOCK_M * (n // (_TILES * wide_tile.BLOCK_N))
        return tiles if rounds(blocks) * _TILES * several <= rounds(blocks * _TILES) * one else wide

    rest = MAX_TOKENS, tiles if is_short else wide
    return ranges(choose, after, wide_tile.BLOCK_M, _SHORT_TOKENS if is_short else _LONG_TOKENS, rest)


def _tall_or(wide: Config, n: int, after: int) -> _Pairs:
    """Return the pairs for more than `after` tokens: tall tiles where they are as few rounds as wide ones."""
    tall = Config(fp8_gemm_tall.TALL_M, fp8_gemm_tall.BLOCK_N, _TALL_STAGES, False, 3, form="tall")

    def choose(m: int) -> Config:
        number = {c: rounds(-(-m // c.block_m) * (n // c.block_n)) for c in (tall, wide)}
        return tall if number[tall] <= number[wide] else wide

    return ranges(choose, after, _TALL_STEP, _TALL_TOKENS, (MAX_TOKENS, wide))


def _turns_or(wide: Config, n: int, k: int, after: int) -> _Pairs:
    """Return the pairs for more than `after` tokens: several tiles a block where they are as few rounds."""
    found = []
    for tiles in _TURNS[n, k]:
        shares = fp8_gemm_tiles.shares(k, 1, tiles, fp8_gemm_tiles.QUARTER)
        assert shares is not None, "tiles that were measured fit"
        found.append(replace(wide, num_stages=shares[0], form="tiles", tiles=tiles, held_columns=shares[1]))

    def choose(m: int) -> Config:
        blocks = m // wide_tile.BLOCK_M * (n // wide_tile.BLOCK_N)
        return next((c for c in found if rounds(blocks // c.tiles) * c.tiles <= rounds(blocks)), wide)

    return ranges(choose, after, wide_tile.BLOCK_M, _TURNS_TOKENS, (MAX_TOKENS, wide))


def _many(n: int, k: int, scale: str) -> Config:
    depth = wide_tile.num_stages(k, 1 if scale == E8M0 else 4)
    if n % wide_tile.BLOCK_N == 0 and depth is not None:
        return Config(wide_tile.BLOCK_M, wide_tile.BLOCK_N, depth, False, warpgroups=2, form="wide")
    block_n = 256 if n % 256 == 0 else 128
    return Config(128, block_n, num_stages=3, weights_first=False, warpgroups=2)


def _some(n: int, k: int, scale: str) -> _Pairs:
    """Return the pairs between the fewest tokens and many."""
    if n >= _WIDE:
        tiles = _RUNS.get((n, k)) if scale == E8M0 else None
        if tiles is not None:
            run = Config(
                64, BLOCK_N, _RUN_STAGES, weights_first=False, warpgroups=1, form="runs", tiles=tiles
            )
            return (64, run), (128, replace(run, block_m=128, warpgroups=2)), (256, _many(n, k, scale))
        tall = _flight(k, scale, 128, 128) or Config(128, 128, 6, weights_first=False, warpgroups=2)
        return (64, Config(64, 128, num_stages=4, weights_first=False, warpgroups=1)), (256, tall)
    if n <= _ONE_WAVE:
        found = [
            (
                min(_side_by_side(n, block_m, block_n), most),
                _flight(k, scale, block_m, block_n, True),
            )
            for (block_m, block_n), most in _LADDER
        ]
    else:
        found = [(64, _flight(k, scale, 64, 64)), (256, _flight(k, scale, 128, 64))]
    pairs = tuple((limit, config) for limit, config in found if config is not None)
    if len(pairs) == len(found):
        return _with_added(pairs, n, k, scale)
    short = Config(block_m=64, block_n=32, num_stages=12, weights_first=False, warpgroups=1)
    return (64, short), (256, Config(128, 32, num_stages=8, weights_first=False, warpgroups=1))


def _flight(k: int, scale: str, block_m: int, block_n: int, deep: bool = False) -> Config | None:
    """Return the tile with two blocks of channels a stage, None where k does not allow it."""
    depth = fp8_gemm_async.num_stages(k, 1 if scale == E8M0 else 4, block_m, block_n, deep)
    if k % (2 * BLOCK_K) or depth is None:
        return None
    return Config(block_m, block_n, depth, False, warpgroups=block_m // INSTRUCTION_M, form="flight")
