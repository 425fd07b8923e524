"""What the compiler's front end makes is the same whether it is kept or made again."""

from types import SimpleNamespace

import pytest
from tilelang import language as T
from tilelang.language.eager import builder
from tvm.ir import structural_equal

from dsv4_kernels import registry
from verify import frontend


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(builder, "mutate", frontend.rewritten)
    monkeypatch.setattr(frontend, "_kept", {})
    return frontend._kept


class Plain(builder.BaseBuilder):
    """Runs a rewritten function as Python would."""

    def set_fileline(self, filename, line, function):
        pass


def closure_over(value, kind):
    def body(x):  # pyright: ignore
        x: kind.float32  # pyright: ignore
        return value

    return body


def test_each_closure_has_its_own_values(kept):
    made = [frontend.rewritten(closure_over(value, T)) for value in (1, 20)]
    assert len(kept) == 1
    assert [g.gen(Plain())(0) for g in made] == [1, 20]
    assert made[0].source == made[1].source


def test_a_hint_that_names_another_type_is_not_taken_from_what_was_kept(kept):
    other = SimpleNamespace(float32=T.float16)
    for kind in (T, other, T):
        made, stock = frontend.rewritten(closure_over(1, kind)), frontend._stock(closure_over(1, kind))
        assert made.extra_type_hints == stock.extra_type_hints == {"x": kind.float32}
        assert made.source == stock.source


def test_a_kernel_is_the_same_by_what_was_kept(kept, monkeypatch):
    spec = registry.get_kernel("fp4_quant")
    first, again = (spec.make_kernel(**spec.variants[0].kwargs) for _ in range(2))
    assert kept
    monkeypatch.setattr(builder, "mutate", frontend._stock)
    stock = spec.make_kernel(**spec.variants[0].kwargs)
    assert structural_equal(stock, first, map_free_vars=True)
    assert structural_equal(stock, again, map_free_vars=True)
    assert stock.script(show_meta=True) == again.script(show_meta=True)


@pytest.mark.parametrize("name", ["fp8_gemm", "q_norm_rope"])
def test_variants_are_the_same_by_what_was_kept(kept, monkeypatch, name):
    spec = registry.get_kernel(name)
    variants = spec.variants[:4]
    made = [spec.make_kernel(**v.kwargs).script(show_meta=True) for v in variants]
    assert kept
    monkeypatch.setattr(builder, "mutate", frontend._stock)
    assert made == [spec.make_kernel(**v.kwargs).script(show_meta=True) for v in variants]
    assert len(set(made)) == len(variants)
