"""examples/quickstart.ipynb: its code runs from top to bottom, and it is committed without outputs."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from project import ROOT

pytestmark = pytest.mark.cpu
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_committed_without_outputs_and_links_to_what_there_is(cells):
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    links = re.findall(r"\]\(([^)#]+)\)", "".join("".join(cell["source"]) for cell in cells))
    assert len(links) > 5
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


def test_its_code_runs_from_top_to_bottom(cells, tmp_path, monkeypatch, capsys):
    """As a reader runs it; the comparisons are in the notebook itself, and training has to bring something."""
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(NOTEBOOK.parent))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"), names)
    after, before = names["after"], names["before"]
    assert after["eval_perplexity"] < 0.8 * before["eval_perplexity"]
    assert after["eval_accuracy/truncation"] > before["eval_accuracy/truncation"]
    said = capsys.readouterr().out
    assert all(word in said for word in ("examples to train on", "the same gradients", "held-out accuracy", "FusedDPO"))
