"""Expressions and macros shared by the kernels."""
