"""Every notebook runs from its first cell to its last, on few rows."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SHOWS = {"quickstart": ("'loaded': 103", "linear_probe", "image/png", "leaves with a gradient: 16")}


def _shown(cell):
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        for kind, value in output.get("data", {}).items():
            yield kind
            yield value


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
    monkeypatch.setenv("JTL_NOTEBOOK_ROWS", "32")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws in the page
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = "\n".join(text for cell in notebook.cells for text in _shown(cell))
    for words in SHOWS[name]:
        assert words in shown, words


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_output_and_installs_on_colab_alone(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 'if "google.colab" in sys.modules' in code[0].source
