"""Which samples the page shows: by a rule that is printed with them, never by hand."""

from typing import Any

from alignkit.report.run import number

EACH = 3


def chosen(rows: list[dict[str, Any]]) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """(what each shown row is, the row), in the order of the page, and the rule in words.

    Rows that were judged are ordered by how much better the aligned sample is; others by how much changed at all.
    """
    if len(rows) <= 3 * EACH:
        return [("", row) for row in rows], "These are all samples, not a choice of the best."
    judged = all(number(row, "fault_base") is not None for row in rows)
    gain = _gain if judged else lambda row: number(row, "change") or 0.0
    ordered = sorted(rows, key=gain, reverse=True)
    middle = (len(ordered) - EACH) // 2
    names = ("largest gain", "median", "worst") if judged else ("largest change", "median", "smallest change")
    parts = ordered[:EACH], ordered[middle : middle + EACH], ordered[-EACH:]
    shown = [(name, row) for name, part in zip(names, parts, strict=True) for row in part]
    by = (
        "by how much less likely a fault became, plus 1 where the prompt came to be followed and minus 1 where it "
        "ceased to be"
        if judged
        else "by the mean difference of their pixels"
    )
    return shown, (
        f"All {len(rows)} samples were ordered {by}; shown are the {EACH} at the top, the {EACH} in the middle and the "
        f"{EACH} at the bottom."
    )


def _gain(row: dict[str, Any]) -> float:
    following = bool(row.get("followed_aligned")) - bool(row.get("followed_base"))
    return (number(row, "fault_base") or 0.0) - (number(row, "fault_aligned") or 0.0) + following
