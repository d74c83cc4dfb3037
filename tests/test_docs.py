"""The documents' links lead somewhere, the tests that they name exist, and their Python runs when pasted."""

import re
from pathlib import Path

import numpy as np
import pytest

from bigru.model.forecaster import HandForecaster
from bigru.model.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RUN = "runs/20261123_224500"
"""The run that the documents speak of."""


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


def snippets(document):
    """Returns each Python block of a document with the number of its first line."""
    text = document.read_text()
    return [(text[: found.start(1)].count("\n"), found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.S)]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if snippets(path)], ids=lambda path: path.name)
def test_python_runs_when_pasted(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RUN).mkdir(parents=True)
    save_weights(tmp_path / RUN / "weights.safetensors", HandForecaster(hidden_size=8).state_dict())
    # The one name that a reader has and a document cannot define.
    names = {"camera": [np.full((2, 21, 2), 0.5)] * 61}
    for line, code in snippets(document):
        # Blank lines in front: a failure is shown at the document's own line.
        exec(compile("\n" * line + code, str(document), "exec"), names)
