"""The log: every entry has its four parts and a row in the index, and no link is dead."""

import re
from pathlib import Path

import pytest

LOG = Path(__file__).parent.parent / "dev" / "LOG.md"
ENTRIES = sorted((LOG.parent / "log").glob("*.md"))
INDEX = LOG.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_has_its_parts_and_living_links(path):
    text = path.read_text(encoding="utf-8")
    assert re.match(r"\d{4}-\d\d-\d\d-[a-z0-9-]+$", path.stem)
    places = [text.find(f"**{part}.**") for part in ("Question", "What was run", "Result", "Verdict")]
    assert -1 not in places and places == sorted(places)
    for link in re.findall(r"\]\(([^)]+\.md)\)", text):
        assert (path.parent / link).is_file(), link


def test_the_index_names_every_entry_newest_first_with_a_short_verdict():
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[.+\]\(log/(.+)\.md\) \| (.+) \|$", INDEX, re.MULTILINE)
    dates = [date for date, _, _ in rows]
    assert sorted(name for _, name, _ in rows) == sorted(path.stem for path in ENTRIES)
    assert all(name.startswith(date) for date, name, _ in rows) and dates == sorted(dates, reverse=True)
    assert all(len(verdict.split()) <= 15 for _, _, verdict in rows)
