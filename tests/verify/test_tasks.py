"""How tasks are shared out among processes."""

from verify.tasks import MAX_PART, parts_of, select, workers


def test_long_tasks_begin_first_and_variants_for_the_same_dims_stay_together() -> None:
    tasks = select(None, ("act_quant", "fp8_fp4_gemm"), ())
    costs = [10] * len(tasks)
    costs[-1] = 1000
    parts = parts_of(tasks, costs)

    assert len(tasks) - 1 in parts[0]
    assert sorted(n for part in parts for n in part) == list(range(len(tasks)))
    assert max(map(len, parts)) <= MAX_PART
    first = next(n for n, t in enumerate(tasks) if t.kernel == "fp8_fp4_gemm")
    together = next(part for part in parts if first in part)
    assert {tasks[n].variant.rsplit("-", 1)[0] for n in together} == {tasks[first].variant.rsplit("-", 1)[0]}
    assert len(together) > 1


def test_suites_about_one_kernel_stay_together() -> None:
    tasks = select(None, ("megamoe",), ())
    parts = parts_of(tasks, [0] * len(tasks))
    names = [{tasks[n].variant for n in part} for part in parts]

    wanted = {f"{what}-pro-fp4-4096" for what in ("roles", "signals", "properties", "machine", "refinement")}
    (together,) = [found for found in names if "roles-pro-fp4-4096" in found]
    assert wanted <= together
    assert all(name.endswith("-pro-fp4-4096") for name in together)


def test_without_known_costs_parts_begin_in_order_and_the_last_of_one_come_behind_its_first() -> None:
    tasks = select(None, ("fp8_fp4_gemm",), ())
    parts = parts_of(tasks, [0] * len(tasks))
    assert [n for part in parts for n in sorted(part)] == list(range(len(tasks)))
    assert all(part == [part[0], *sorted(part[1:], reverse=True)] for part in parts)
    assert all(part[0] == min(part) for part in parts)


def test_results_come_in_the_order_of_the_items() -> None:
    with workers(2) as pool:
        found = list(pool.map(divmod, [7, 8, 9, 10], 4, [[3], [1, 0], [2]]))
    assert found == [(1, 3), (2, 0), (2, 1), (2, 2)]
