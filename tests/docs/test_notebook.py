"""docs/tutorials/first_student.ipynb runs from top to bottom and prints what it shows; its first cell gets tiny sizes."""

import json
import os

import pytest
from tiny_runs import ROOT
from tutorial_pages import PageDiffersError, compare

NOTEBOOK = ROOT / "docs/tutorials/first_student.ipynb"
TINY = dict(OUT="notebook_out", TRAIN_IMAGES=168, TEST_IMAGES=32, TEACHER_EPOCHS=2, STUDENT_EPOCHS=1, LABELS=8)


def printed(cell):
    """What a cell printed and its value as text; pictures by their kind."""
    found = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            found.append(output["text"] if output["name"] == "stdout" else "")
        else:
            found.append("\n".join(sorted(output["data"])))
    return "\n".join("".join(text) for text in found)


def run(notebook, folder):
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def check(stored, done):
    for number, (before, after) in enumerate(zip(stored.cells, done.cells, strict=True)):
        compare(printed(before), printed(after), f"{NOTEBOOK.name}, cell {number}")


@pytest.fixture
def stored():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_notebook_from_top_to_bottom(stored, tmp_path, monkeypatch):
    import nbformat

    # the kernel is a process of its own, which finds hgkd as this one does
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    tiny = nbformat.from_dict(stored)
    (sizes,) = (cell for cell in tiny.cells if "parameters" in cell.metadata.get("tags", []))
    names: dict = {}
    exec(sizes.source, names)
    assert names.keys() - {"__builtins__"} == TINY.keys()
    sizes.source = "\n".join(f"{name} = {value!r}" for name, value in TINY.items())
    done = run(tiny, tmp_path)
    check(nbformat.read(NOTEBOOK, as_version=4), done)


def test_every_cell_was_run_and_what_it_shows_is_small(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert len(json.dumps(outputs)) < 150_000


def test_another_output_is_noticed(stored):
    import nbformat

    other = nbformat.from_dict(json.loads(json.dumps(stored)))
    cell = next(cell for cell in other.cells if printed(cell).strip())
    cell.outputs[0]["text"] = "something else\n"
    with pytest.raises(PageDiffersError, match=r"first_student\.ipynb, cell"):
        check(other, stored)
