"""Runs a kernel's device IR on small shapes, thread by thread, and finds what is wrong with it.

    from verify.interp import device
    device.run(make_kernel(n=128, k=256), x, x_scale, w, w_scale, out, seed=1, policy="late")

The unit that runs is a warp; its lanes share an instruction until they diverge, and each thread has its
own vector clock. Asynchronous copies and matrix products complete when the schedule says so. A fault is
raised as one of the classes of `errors`. Read docs/interpreter/device.md for what is checked and how.
"""

from verify.interp.device.api import explore, run, run_function
from verify.interp.device.errors import (
    AddressOverflowError,
    ArrivalError,
    AsyncRegisterError,
    BarrierDivergenceError,
    BarrierInitError,
    ClusterLifetimeError,
    ClusterRankError,
    DataRaceError,
    DeadlockError,
    DeviceError,
    LaunchError,
    MisalignedError,
    OutOfBoundsError,
    ProxyFenceError,
    ScheduleDependentError,
    StepLimitError,
    TransactionError,
    UninitialisedReadError,
    Where,
)
from verify.interp.device.replay import Replay, replay
from verify.interp.device.run import Checks, Summary
from verify.interp.device.schedule import POLICIES, Policy

__all__ = [
    "POLICIES",
    "AddressOverflowError",
    "ArrivalError",
    "AsyncRegisterError",
    "BarrierDivergenceError",
    "BarrierInitError",
    "Checks",
    "ClusterLifetimeError",
    "ClusterRankError",
    "DataRaceError",
    "DeadlockError",
    "DeviceError",
    "LaunchError",
    "MisalignedError",
    "OutOfBoundsError",
    "Policy",
    "ProxyFenceError",
    "Replay",
    "ScheduleDependentError",
    "StepLimitError",
    "Summary",
    "TransactionError",
    "UninitialisedReadError",
    "Where",
    "explore",
    "replay",
    "run",
    "run_function",
]
