"""The page: sections in the order in which a reader asks."""

from pathlib import Path

from alignkit.files import write_atomically
from alignkit.report.curves import curves
from alignkit.report.figures import effect, pairs
from alignkit.report.made import configuration, made
from alignkit.report.run import read_run
from alignkit.report.tables import header, numbers_section, skipped, verdict

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = Path(__file__).with_name("style.css")


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory from what the other stages left there, and return its path.

    The page loads nothing from anywhere else (its content policy forbids it) and holds no script. What is
    missing is said to be not available. Raises DataError if summary.json is missing or cannot be read.
    """
    run = read_run(Path(run_dir))
    sections = (header, pairs, effect, verdict, numbers_section, made, curves, skipped, configuration)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>alignkit: preference alignment report</title>
<link rel="icon" href="data:,">
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{"".join(section(run) for section in sections)}
</main>
</body>
</html>
"""
    path = Path(run_dir) / "report.html"
    write_atomically(path, page.encode("utf-8"))
    return path
