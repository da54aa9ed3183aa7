"""notebooks/ladder.ipynb runs from top to bottom. To run it in full and keep its pictures:

WRITE_NOTEBOOK=1 .venv/bin/python -m pytest -n 0 -m slow tests/scripts/test_notebook.py
"""

import os
import shutil

import pytest
from children import ROOT

PATH = ROOT / "notebooks" / "ladder.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_ends_with_a_seven(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    write = bool(os.environ.get("WRITE_NOTEBOOK"))
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("utils", "notebooks"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("LADDER_STEPS", "1000" if write else "5")
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):  # a user has not set these
        monkeypatch.delenv(name)
    if write:
        monkeypatch.delenv("OMP_NUM_THREADS")
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 10
    assert write or sum(str(cell.outputs).count("image/png") for cell in code) >= 6  # the notebook keeps its pictures
    client(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) >= 6 and code[-1].outputs[-1].output_type == "execute_result"  # the image of a seven
    if write:
        for cell in code:
            cell.outputs = [output for output in cell.outputs if "data" in output]
            for output in cell.outputs:
                output.data.pop("image/jpeg", None)
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, PATH)
        shutil.copytree(tmp_path / "outputs" / "ladder", ROOT / "outputs" / "ladder", dirs_exist_ok=True)
