"""DeepSeek-V4's kernels in TileLang, proved."""

from dsv4_kernels.contract import ContractError
from dsv4_kernels.data_checks import check_data
from dsv4_kernels.runtime import backend

__all__ = ["ContractError", "backend", "check_data"]
