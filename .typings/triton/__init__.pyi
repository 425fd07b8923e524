# Only CUDA builds of torch bring triton, and a checker has to say the same with it and without.
from typing import Any

def __getattr__(name: str) -> Any: ...
