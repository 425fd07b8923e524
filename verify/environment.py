"""What the compiler's environment variables say, told apart from where a checkout happens to lie.

Certificates name the source that a text came from by a hash. The compiler sets variables such as
TL_TEMPLATE_PATH to folders of its own installation, so their values differ from one checkout to the
next while what they name is the same package; a folder elsewhere is another matter, and its files count.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_READ = ("TILELANG_", "TL_", "TVM_")
# Where caches lie and what is printed decides no text.
_NOT_READ = frozenset(
    {"TILELANG_CACHE_DIR", "TILELANG_TMP_DIR", "TILELANG_DISABLE_CACHE", "TILELANG_PRINT_ON_COMPILATION"}
)


def compiler_environment(environ: Mapping[str, str], package: Path) -> dict[str, str]:
    """Return what the variables that the compiler reads stand for, the same for every place of its package.

    Args:
        environ: variables by name, as `os.environ`.
        package: folder of the installed compiler, whose version is hashed elsewhere.
    """
    root = package.resolve()
    return {
        name: os.pathsep.join(_meaning(part, root) for part in value.split(os.pathsep))
        for name, value in environ.items()
        if name.startswith(_READ) and name not in _NOT_READ
    }


def _meaning(part: str, root: Path) -> str:
    """Return a part of a variable's value; for a path, what lies there.

    A bare word is no path, even where a file of that name lies in the working directory.
    """
    if os.sep not in part:
        return part
    path = Path(part).resolve()
    if path.is_relative_to(root):
        return f"package:{path.relative_to(root).as_posix()}"
    return f"contents:{_contents_sha256(path)}" if path.exists() else f"absent:{part}"


@cache
def _contents_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, or of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
