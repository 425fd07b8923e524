"""Execution of a launch: every block of a grid.

The blocks run together in chunks, as lanes; where the kernel names its thread, threads are lanes too.
This lockstep order is one of the orders that the hardware may take, and asynchronous copies and matrix
products complete at once in it. For a kernel without races (which the prover checks) every order gives
the same result, atomics aside.
"""

import math
from typing import Any

from verify import ir
from verify.interp.lanes import BLOCK_AXES, FIXED_AXES, THREAD_AXIS, Affine, Value
from verify.interp.progress import Progress
from verify.interp.statements import Statements
from verify.interp.warps import names_threads

# A tensor over all lanes of a chunk stays below this many elements where one block allows it.
_CHUNK_ELEMENTS = 1 << 21
_BLOCK_TAGS = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_THREAD_TAGS = ("threadIdx.x", "threadIdx.y", "threadIdx.z")


class Machine(Statements):
    """Runs a kernel; attributes as in Statements."""

    def _launch(self, stmt: ir.Launch) -> None:
        """Run a kernel body for every block of its grid."""
        launches: list[ir.Launch] = []
        body: ir.Stmt = stmt
        while isinstance(body, ir.Launch):
            launches.append(body)
            body = body.body
        for launch in launches:
            if launch.tag not in _BLOCK_TAGS + _THREAD_TAGS:
                raise ir.UnsupportedIR(f"launch index {launch.tag}")
        extents = {launch.tag: self.integer(launch.extent, "launch extent") for launch in launches}
        self._bind_threads(launches, extents, body)
        grid = [extents.get(tag, 1) for tag in _BLOCK_TAGS]
        step = self._chunk(grid, body)
        self.progress = Progress(math.prod(grid))
        try:
            for z in range(0, grid[2], step[2]):
                for y in range(0, grid[1], step[1]):
                    for x in range(0, grid[0], step[0]):
                        start = (x, y, z)
                        for d in range(BLOCK_AXES):
                            self.lanes.extents[d] = min(step[d], grid[d] - start[d])
                        self._run_blocks(launches, start, body)
                        self.progress.advance(math.prod(self.lanes.extents[:BLOCK_AXES]))
        finally:
            self.progress.close()
        self.lanes.extents[:] = [1] * FIXED_AXES

    def _run_blocks(self, launches: list[ir.Launch], start: tuple[int, ...], body: ir.Stmt) -> None:
        for launch in launches:
            if launch.tag in _BLOCK_TAGS:
                d = _BLOCK_TAGS.index(launch.tag)
                alone = self.lanes.extents[d] == 1
                self.env[launch.var] = start[d] if alone else Affine(start[d], ((d, 1),))
        self._left.append(None)
        try:
            self.execute(body)
        finally:
            self._left.pop()

    def _bind_threads(self, launches: list[ir.Launch], extents: dict[str, int], body: ir.Stmt) -> None:
        sizes = [extents.get(tag, 1) for tag in _THREAD_TAGS]
        named, differ = set(), False
        for node in ir.walk(body):
            if isinstance(node, ir.Var):
                named.add(node)
            differ = differ or names_threads(node)
        threads = [launch for launch in launches if launch.tag in _THREAD_TAGS]
        is_named = differ or any(t.var in named and extents[t.tag] > 1 for t in threads)
        self.lanes.extents[THREAD_AXIS] = math.prod(sizes) if is_named else 1
        self.thread_vars = {t.var for t in threads} if is_named else set()
        for thread in threads:
            d = _THREAD_TAGS.index(thread.tag)
            if sizes[d] == 1:
                self.env[thread.var] = 0
            elif is_named:
                self.env[thread.var] = self._thread_index(d, sizes)

    def _thread_index(self, d: int, sizes: list[int]) -> Value:
        if sizes[d] == math.prod(sizes):
            return Affine(0, ((THREAD_AXIS, 1),))
        return self.lanes.index(THREAD_AXIS) // math.prod(sizes[:d]) % sizes[d]

    def _chunk(self, grid: list[int], body: ir.Stmt) -> list[int]:
        """Return how many blocks of each grid axis to run together."""
        if any(isinstance(node, ir.Call) and node.op == "sync_grid" for node in ir.walk(body)):
            return grid  # a block waits for all others
        heaviest = self._lanes_per_block(body)
        for node in ir.walk(body):
            if isinstance(node, ir.Block):
                sizes = [math.prod(self.integer(s, "buffer shape") for s in b.shape) for b in node.allocs]
                heaviest = max(heaviest, *sizes, 1)
        room = max(_CHUNK_ELEMENTS // max(heaviest * self.lanes.extents[THREAD_AXIS], 1), 1)
        step = []
        for extent in grid:
            step.append(max(min(extent, room), 1))
            room = max(room // step[-1], 1)
        return step

    def _lanes_per_block(self, stmt: Any) -> int:
        inner = max((self._lanes_per_block(child) for child in ir.children(stmt)), default=1)
        if isinstance(stmt, ir.For) and stmt.kind == "parallel" and isinstance(stmt.extent, ir.Const):
            return inner * int(stmt.extent.value)
        return inner
