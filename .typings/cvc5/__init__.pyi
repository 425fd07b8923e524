# cvc5's Python names come from an extension module without types.
from typing import Any

def __getattr__(name: str) -> Any: ...
