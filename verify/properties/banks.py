"""Bank conflicts of shared memory: the worst degree of each access, against the limit that is declared.

The degree (see `banks`) is reported for every access. With a limit, `KernelSpec.max_bank_conflict` or
`BANK_LIMITS` of a file, an access above it is REFUTED; without one there is nothing to prove.
"""

import z3

from verify.banks import Banks, Conflict
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.tasks import BANK_LIMIT

NAME = "banks"


class BankConflicts:
    """Property `banks`."""

    name = NAME
    depends: tuple[str, ...] = ("overflow",)

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each access where a limit is declared."""
        claims = Claims()
        limit = context.contract.consts.get(BANK_LIMIT)
        try:
            conflicts, unknown = Banks(context).conflicts()
        except UnsupportedIR as error:
            conflicts, unknown = [], [(None, str(error))]
        worst = max((c.degree for c in conflicts), default=1)
        claims.notes.append(f"bank conflicts: {len(conflicts)} accesses, worst degree {worst}")
        reported = {_text(c): None for c in conflicts if c.degree > 1}
        claims.notes += list(reported)
        if limit is None:
            claims.notes += [f"bank conflicts not decided: {what}" for _, what in unknown]
            return claims
        claims.obligations += [_within(c, int(limit)) for c in conflicts if c.exact or c.degree <= limit]
        claims.unknown += [Issue(span, f"bank conflicts: {what}") for span, what in unknown]
        for conflict in conflicts:
            if not conflict.exact and conflict.degree > limit:
                message = f"{_text(conflict)} if all lanes are active, over the limit {limit}"
                claims.unknown.append(Issue(conflict.site.span, message))
        return claims


PROPERTY = BankConflicts()


def _text(conflict: Conflict) -> str:
    where = ", ".join(f"{k} {v}" for k, v in conflict.where.items())
    line = f" (line {conflict.site.span.line})" if conflict.site.span is not None else ""
    return f"bank conflict of degree {conflict.degree}: {conflict.what}{line}" + (
        f", {where}" if where else ""
    )


def _within(conflict: Conflict, limit: int) -> Obligation:
    return Obligation(
        f"{conflict.what}: bank conflicts of degree at most {limit}",
        conflict.site.span,
        conflict.site.scope.hypotheses,
        z3.BoolVal(conflict.degree <= limit),
        {"degree": conflict.degree, **conflict.where},
        conflict.site,
    )
