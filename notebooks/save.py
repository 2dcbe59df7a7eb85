"""Runs notebooks from their text sources and saves them with their outputs.

    python notebooks/save.py            # all of them
    python notebooks/save.py 4          # the one whose name begins with 4

The .py files are what is edited and read in diffs; the .ipynb files are made from them.
"""

import base64
import io
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
LARGEST = 300_000  # bytes


def save(source: Path) -> None:
    notebook = jupytext.read(source)
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent", "notebook_metadata_filter": "-all"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same every time, for the sake of diffs
    start = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    seconds = time.perf_counter() - start
    notebook.metadata.language_info = {"name": "python"}

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            make_smaller(output)
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    size = target.stat().st_size
    print(f"{target.name}: {seconds:.0f} s, {size / 1000:.0f} kB")
    if size > LARGEST:
        raise SystemExit(f"{target.name} is over {LARGEST / 1000:.0f} kB: draw less, or smaller")


def make_smaller(output: dict) -> None:
    """A drawing does with 128 colours."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        with io.BytesIO() as buffer:
            small = picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            small.save(buffer, "png", optimize=True)
            data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sources = sorted(HERE.glob("[0-9]_*.py"))
    for source in sources:
        if len(sys.argv) < 2 or source.name[0] in sys.argv[1:]:
            save(source)
