"""Every notebook runs from its first cell to its last, on few rows."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SHOWS = {
    "forgetting": (
        "per example, batches of 32 and 128 agree: True",
        "EWC keeps more of the first task than nothing does",
        "image/png",
        "backward_transfer",
    ),
    "masks": (
        "('heads/.*', 'head') matches no leaf",
        "State ('blocks/0/bias'",
        "MLP ('layers/0/weight'",
        "optax.masked alone     the held leaf goes from 1 to 1.50",
        "masks.optimizer        the held leaf goes from 1 to 1.00",
        "all gradients cost 3.0 forward passes, the split 1.0",
        "held leaves kept their bits: 24 of 26",
        "steps that Adam counts: {'head': 21, 'last_block': 1}",
    ),
    "quickstart": ("'loaded': 103", "linear_probe", "image/png", "leaves with a gradient: 16"),
}


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
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # and one device
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws in the page
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = "\n".join(text for cell in notebook.cells for text in _shown(cell))
    for words in SHOWS[name]:
        assert words in shown, words


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_output_or_as_it_ran(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 'if "google.colab" in sys.modules' in code[0].source
    counts = [cell.execution_count for cell in code]
    if not any(counts):
        assert not any(cell.outputs for cell in code)
        return
    assert counts == list(range(1, len(code) + 1))
    assert not any("error" in str(output.output_type) for cell in code for output in cell.outputs)
    shown = "\n".join(text for cell in code for text in _shown(cell))
    for words in SHOWS[name]:
        assert words in shown, words
