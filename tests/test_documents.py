"""Documents that name tests name tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_compatibility_table_names_tests_that_exist():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, f"no test is named in: {row}"
        for file, name in named:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"\ndef {name}(" in source, f"{file} has no {name}"
