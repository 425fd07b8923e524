"""Proofs for dims that the library does not ship, and where their certificates count."""

import json

import pytest
from click.testing import CliRunner

from dsv4_kernels import registry, runtime
from dsv4_kernels.attention import q_norm_rope
from dsv4_kernels.registry import all_kernels, get_kernel
from verify import certificates, cli, extract, shapes
from verify.tasks import Task, TaskError, select

OWN = (("num_heads", 16),)  # q_norm_rope ships 64 and 128


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of the user's own certificates."""
    monkeypatch.setenv("DSV4_CERTIFICATES", str(tmp_path))
    certificates._proved.cache_clear()
    yield tmp_path
    certificates._proved.cache_clear()


def invoke(*args):
    return CliRunner().invoke(cli.command, [*args, "-j", "1"])


@pytest.mark.parametrize("name", [spec.name for spec in all_kernels()])
def test_the_dispatcher_makes_every_registered_variant_for_its_own_dims(name):
    spec = get_kernel(name)
    for variant in spec.variants:
        dims = {n: v for n, v in variant.dims().items() if n not in spec.batch_dims}
        found = shapes.variants_for(name, tuple(sorted(dims.items())))
        assert found[variant.id].kwargs == variant.kwargs


def test_all_variants_that_some_batch_takes_are_chosen_and_know_each_other():
    dims = (("k", 2048), ("n", 5120))
    tasks = select(None, ("fp8_gemm",), (), dims)
    assert {task.variant for task in tasks} == {
        f"n5120-k2048-{scale}-{tile}"
        for scale in ("e8m0", "f32")
        for tile in ("m16", "m64x64", "m128x64", "m128x256")
    }
    dispatch = tasks[0].dispatch()
    assert dispatch.fixed == {"n": 5120, "k": 2048}
    assert {*dispatch.siblings, dispatch.variant} == {task.variant for task in tasks}
    assert dispatch.select is not None
    assert dispatch.select({"m": 16, "n": 5120, "k": 2048, "f32_scales": 1}) == "n5120-k2048-f32-m16"
    assert tasks[0].command.startswith("dsv4-verify --kernel fp8_gemm --dims k=2048,n=5120 --variant ")


@pytest.mark.parametrize(
    ("kernel", "dims", "message"),
    [
        ("fp8_gemm", {"n": 100, "k": 2048}, r"requires n % BLOCK_N == 0, got n=100"),
        ("fp8_gemm", {"n": 5120, "k": 2048, "m": 3}, "requires no dim m, which stays symbolic"),
        ("fp8_gemm", {"n": 5120}, "no variants for dims n=5120, of n, k, f32_scales"),
        ("grouped_fp8_fp4_gemm", {"n": 2048, "k": 2048, "num_experts": 16}, "looks alignment up in a table"),
        ("no_such_kernel", {"n": 128}, "no kernel or variant called no_such_kernel"),
    ],
)
def test_dims_that_no_variant_serves_are_an_error_that_says_why(kernel, dims, message):
    with pytest.raises(TaskError, match=message):
        select(None, (kernel,), (), tuple(dims.items()))


def test_dims_are_of_one_kernel():
    for kernels in ((), ("act_quant", "fp8_gemm")):
        with pytest.raises(TaskError, match=f"dims are of one kernel, got {len(kernels)}"):
            select(None, kernels, (), OWN)


@pytest.mark.parametrize("text", ["", "n", "n=", "n=-1", "n=x", "=4", "n=1,n=2", "n=1,"])
def test_dims_of_another_form_are_an_error(text):
    result = invoke("--kernel", "fp8_gemm", "--dims", text)
    assert result.exit_code == 2
    assert "requires name=number" in result.output


@pytest.mark.parametrize("other", [["--mutate"], ["--corpus"]])
def test_dims_are_of_what_is_proved(other):
    result = invoke("--kernel", "fp8_gemm", "--dims", "n=128,k=128", *other)
    assert result.exit_code == 2
    assert "--dims are of a registered kernel that is proved" in result.output


def test_own_dims_are_proved_and_their_certificates_count_at_launches(own, monkeypatch):
    asked = ("--kernel", "q_norm_rope", "--dims", "num_heads=16")
    task = Task("q_norm_rope", "h16", dims=OWN)
    with task.compiler():
        text = extract.extract(task.load().prim_func).cuda_text
    monkeypatch.setenv("DSV4_PROOF", "require")
    with pytest.raises(runtime.UnprovedVariantError, match="q_norm_rope --dims num_heads=16 --write"):
        runtime._gate(q_norm_rope.make_kernel, {"num_heads": 16}, text)

    shipped = sorted(certificates.FOLDER.rglob("*.json"))
    assert invoke(*asked, "--check").exit_code == 2
    result = invoke(*asked, "--write")
    assert result.exit_code == 0, result.output
    assert [p.relative_to(own).as_posix() for p in own.rglob("*.json")] == ["q_norm_rope/h16.json"]
    assert sorted(certificates.FOLDER.rglob("*.json")) == shipped
    runtime._gate(q_norm_rope.make_kernel, {"num_heads": 16}, text)
    assert "1 from certificates" in invoke(*asked).output
    assert invoke(*asked, "--check").exit_code == 0

    path = own / "q_norm_rope" / "h16.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verifier_sha256": "0" * 64}))
    certificates._proved.cache_clear()
    with pytest.raises(runtime.UnprovedVariantError):  # another verifier's word
        runtime._gate(q_norm_rope.make_kernel, {"num_heads": 16}, text)
    assert invoke(*asked, "--check").exit_code == 2


def test_a_kernel_that_is_not_registered_is_proved_by_the_command_alone():
    assert runtime._proving(lambda: None, {"n": 1}) == "dsv4-verify"
    for spec in registry.all_kernels():
        assert runtime._proving(spec.make_kernel, spec.variants[0].kwargs).startswith("dsv4-verify --kernel ")


def test_own_certificates_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("DSV4_CERTIFICATES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert certificates.own_folder() == tmp_path / "dsv4_kernels" / "certificates"
    monkeypatch.setenv("DSV4_CERTIFICATES", "elsewhere")
    assert certificates.own_folder().as_posix() == "elsewhere"
