"""What an inspection says: findings with cause and cure, aligned tables, and a verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

MUST_FIX, WARNING, NOTE = SEVERITIES = ("must fix", "warning", "note")

VERDICTS = {None: "OK: go", NOTE: "OK: go", WARNING: "WARNINGS: training will run; read them first"}
SHOWN = 3  # places named of each finding
WIDTH = 115


@dataclass(frozen=True)
class Finding:
    """Something about data or settings that a user should know before hours are spent."""

    severity: str
    """One of SEVERITIES."""
    code: str
    """A name that scripts can look for; it does not change with the wording."""
    what: str
    """One sentence, with the count."""
    cause: str = ""
    """The most likely one."""
    fix: str = ""
    where: tuple[str, ...] = ()
    """The first places: file, image, annotation id."""
    count: int = 1

    def text(self) -> str:
        """The finding as a paragraph."""
        lines = textwrap.wrap(f"{self.what} [{self.code}]", WIDTH - 10, break_on_hyphens=False)
        paragraph = [f"{self.severity:<10}{lines[0]}", *(" " * 10 + line for line in lines[1:])]
        more = [f"... and {self.count - len(self.where):,} more"] if 0 < len(self.where) < self.count else []
        for name, value in (("where", "; ".join([*self.where, *more])), ("cause", self.cause), ("fix", self.fix)):
            lines = textwrap.wrap(value, WIDTH - 17, break_long_words=False, break_on_hyphens=False)
            paragraph += [f"{' ' * 10}{name if n == 0 else '':<7}{line}" for n, line in enumerate(lines)]
        return "\n".join(paragraph)


def exit_status(findings: Sequence[Finding]) -> int:
    """For scripts: 0 go, 1 warnings, 2 must not train."""
    severities = {finding.severity for finding in findings}
    return 2 if MUST_FIX in severities else 1 if WARNING in severities else 0


def verdict(findings: Sequence[Finding]) -> str:
    """The findings in one sentence."""
    count = sum(finding.severity == MUST_FIX for finding in findings)
    fix = f"MUST FIX: do not train before {'this is' if count == 1 else f'these {count} are'} fixed"
    return (VERDICTS[None], VERDICTS[WARNING], fix)[exit_status(findings)]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table in columns, the first `left` of them flush left, the others flush right."""
    wide = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{'<' if n < left else '>'}{wide[n]}}" for n, text in enumerate(row)).rstrip()
        for row in (header, *rows)
    )
