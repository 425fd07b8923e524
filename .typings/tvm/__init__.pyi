# TVM ships inside TileLang, which puts it on the path when it is imported: a checker cannot find it.
from typing import Any

def __getattr__(name: str) -> Any: ...
