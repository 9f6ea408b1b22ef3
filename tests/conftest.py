"""The tiers of the test run: each folder's marker, and what was not run said so that nobody overlooks it."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
MARKED_FOLDERS = ("parity", "host", "browser")
LOUD = ("host", "browser")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS) and (folder := item.path.relative_to(TESTS).parts[0]) in MARKED_FOLDERS:
            item.add_marker(folder)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for tier in LOUD:
        # The report of a module that was skipped as a whole has a path, but no keywords.
        path = f"tests/{tier}/"
        reports = [report for report in skipped if path in report.nodeid or tier in getattr(report, "keywords", ())]
        if reports:
            reasons = "; ".join(sorted({str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports}))
            sentence = f"{tier.upper()} TESTS WERE SKIPPED: {len(reports)} NOT RUN ({reasons})"
            terminalreporter.write_line(sentence, yellow=True, bold=True)
