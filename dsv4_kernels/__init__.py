"""DeepSeek-V4's kernels in TileLang, proved."""

from dsv4_kernels.contract import ContractError
from dsv4_kernels.runtime import backend

__all__ = ["ContractError", "backend"]
