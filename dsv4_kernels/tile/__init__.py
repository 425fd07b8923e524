"""Expressions and macros shared by the kernels, and the compiler's corrections.

The corrections are put in place when any of it is imported; what asks for them is said there.
"""

from dsv4_kernels.tile import producer

__all__ = ["producer"]
