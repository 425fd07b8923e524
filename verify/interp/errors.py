"""The interpreter's own failures."""

from verify import ir


class InterpreterError(Exception):
    """The kernel or its arguments broke a rule that the interpreter checks.

    Attributes:
        span: the Python line of the statement that was running, None before the first one.
    """

    def __init__(self, message: str, span: ir.Span | None = None) -> None:
        """Prefix `message` with path:line where a line is known."""
        super().__init__(f"{span.path}:{span.line}: {message}" if span else message)
        self.span = span


class UnsupportedOpError(ir.UnsupportedIR):
    """The kernel uses something that the interpreter has no meaning for.

    Attributes:
        span: as in InterpreterError.
    """

    def __init__(self, message: str, span: ir.Span | None = None) -> None:
        """Prefix `message` with path:line where a line is known."""
        super().__init__(f"{span.path}:{span.line}: {message}" if span else message)
        self.span = span
