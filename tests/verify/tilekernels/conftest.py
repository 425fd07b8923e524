"""Ends a run of these tests with how many of the library's kernels agree, and which do not."""

_TEST = "test_agrees_with_its_reference["


def pytest_terminal_summary(terminalreporter):
    passed, failed = (
        {r.nodeid.split(_TEST)[1].rstrip("]") for r in terminalreporter.getreports(kind) if _TEST in r.nodeid}
        for kind in ("passed", "failed")
    )
    if not passed | failed:
        return
    from tests.verify.tilekernels import cases, harness

    names, kernels = harness.kernel_names(), {case.name: case.kernels for case in cases.all_cases()}
    differs = {kernel for name in failed for kernel in kernels[name]}
    agrees = {kernel for name in passed for kernel in kernels[name]} - differs
    terminalreporter.write_line(f"TileKernels: {len(agrees)} of {len(names)} kernels run and agree")
    for name in names:
        if name not in agrees:
            terminalreporter.write_line(f"  {name}: {'differs' if name in differs else 'not run'}")
