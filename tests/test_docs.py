"""The documents' links lead somewhere, the tests that they name exist, and their Python runs when pasted."""

import itertools
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import bigru
from bigru.command import run
from bigru.model.forecaster import HandForecaster
from bigru.model.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FIRST_HOUR = ROOT / "docs" / "first-hour.md"
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


def snippets(document, languages="python"):
    """Returns each block of a document in these languages: number of its first line, language, text."""
    text, pattern = document.read_text(), rf"```({languages})\n(.*?)```"
    return [(text[: found.start(2)].count("\n"), found[1], found[2]) for found in re.finditer(pattern, text, re.S)]


def paste(document, code, line, names):
    # Blank lines in front: a failure is shown at the document's own line.
    exec(compile("\n" * line + code, str(document), "exec"), names)


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if snippets(path) and path != FIRST_HOUR], ids=lambda path: path.name
)
def test_python_runs_when_pasted(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RUN).mkdir(parents=True)
    save_weights(tmp_path / RUN / "weights.safetensors", HandForecaster(hidden_size=8).state_dict())
    # The one name that a reader has and a document cannot define.
    names = {"camera": [np.full((2, 21, 2), 0.5)] * 61}
    for line, _, code in snippets(document):
        paste(document, code, line, names)


@pytest.mark.slow
def test_the_first_hour_from_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, done = {}, []
    for line, language, text in snippets(FIRST_HOUR, "python|console"):
        if language == "python":
            paste(FIRST_HOUR, text, line, names)
            continue
        for command in text.splitlines():
            module, *arguments = shlex.split(command)[2:]
            if module == "pip":
                continue
            # A tenth of the epochs: what is tested is that each command does what the text says.
            pairs = itertools.pairwise(["", *arguments])
            arguments = [f"{int(word) // 10}" if before == "--epochs" else word for before, word in pairs]
            assert run(module.removeprefix("bigru."), arguments) == 0, command
            done.append(module)
    assert done == [*["bigru.data"] * 2, *["bigru.train"] * 4, "bigru.predict"]
    document = (tmp_path / "runs" / "results_bigru.md").read_text()
    assert document.count("- **Trained on:** after epoch 3") == 1
    assert "## All runs in this folder" in document
    assert len(list((tmp_path / "predictions").iterdir())) == 4 * 6


def test_the_page_of_names_is_current():
    """Else: python docs/make_api.py."""
    make = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == make["text"]()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == bigru.__version__
