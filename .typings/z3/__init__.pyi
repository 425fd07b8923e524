# z3 ships no types; what a checker infers from its source is a union of every AST class for each term.
from typing import Any

def __getattr__(name: str) -> Any: ...
