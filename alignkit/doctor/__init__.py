"""`alignkit doctor`: what this machine will use and what a run's folder holds, in words. Nothing is ever written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was found, and where something will be slow or broken what to do about it."""

    topic: str
    text: str
    advice: str | None = None

    def lines(self, width: int) -> list[str]:
        """As it is printed, the topic in a column of `width`."""
        more = [f"{'':{width}}→ {self.advice}"] if self.advice else []
        return [f"{self.topic:{width}}{self.text}", *more]


def printed(findings: list[Finding]) -> str:
    width = 2 + max(len(finding.topic) for finding in findings)
    return "\n".join(line for finding in findings for line in finding.lines(width))
