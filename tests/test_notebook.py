"""The notebook runs from its first cell to its last, and is committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "ho_sfl.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_committed_without_outputs():
    for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4)):
        assert not cell.outputs
        assert cell.execution_count is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    """It asserts by itself that the replayed ledger gives the trained weights."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {
        "PYTHONPATH": os.pathsep.join(path),
        "TMPDIR": str(tmp_path),  # where it puts its runs
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}  # works from any directory
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    shown = {cell.id: cell.outputs for cell in code_cells(notebook)}
    assert any("image/png" in output.get("data", {}) for output in shown["curve"])
    assert "the same bits" in shown["replay"][0].text
    assert (next(tmp_path.glob("ho-sfl-*")) / "exported" / "model.safetensors").is_file()
