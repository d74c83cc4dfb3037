"""The documents' links lead somewhere, and every test that they name exists in the file that they name it of."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_every_row_names_tests_that_exist():
    document = ROOT / "docs" / "coming-from-nn-gru.md"
    rows = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 30
    for row in rows:
        path, names = re.search(r"\[\w+\.py\]\(([^)]+)\) ((?:`test_\w+`(?:, )?)+) \|$", row).groups()
        text = (document.parent / path).read_text()
        missing = [name for name in re.findall(r"test_\w+", names) if f"def {name}(" not in text]
        assert missing == [], row
