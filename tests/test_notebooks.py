"""The notebooks: they run, their outputs are those that are stored, and the site shows them."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools import notebooks

ROOT = Path(__file__).parent.parent
ALL = sorted(notebooks.FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebooks.read(path)["cells"] if cell["cell_type"] == kind]


def made(*sources: str, **more: Any) -> dict[str, Any]:
    code = [{"cell_type": "code", "metadata": {}, "source": s, "outputs": []} for s in sources]
    return {"cells": code, **more}


@pytest.mark.slow
@each
def test_a_notebook_gives_the_outputs_that_it_holds(path: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "notebooks.py", "--check", path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(tmp_path.iterdir())


@each
def test_a_notebook_is_whole_and_names_the_lines_for_a_large_model(path: Path) -> None:
    code, told = cells(path, "code"), "".join(map(notebooks.text_of, cells(path, "markdown")))
    assert told.startswith("# ")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    (block,) = re.findall(r"```python\n(.*?)```", told, re.DOTALL)
    names = [line.partition(" = ")[0] for line in block.splitlines()]
    assert block.startswith('vlm = VLM.load("llava-hf/llava-1.5-7b-hf")\n')
    assert len(names) == 2
    source = "\n".join(map(notebooks.text_of, code))
    assert all(f"\n{name} = " in f"\n{source}" for name in names), "the same two lines"
    assert "Image.open" not in block or "from PIL import Image\n" in source


@each
def test_a_notebook_has_small_pictures_and_no_paths_of_a_machine(path: Path) -> None:
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert "/tmp" not in json.dumps(output)
            assert str(Path.home()) not in json.dumps(output)
            if picture := output.get("data", {}).get("image/png"):
                assert len(base64.b64decode(picture)) <= notebooks.LARGEST
                assert cell["metadata"]["alt"].endswith(".")


@each
def test_the_site_has_a_page_with_every_picture(path: Path) -> None:
    page, pictures = notebooks.markdown(path)
    assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"\]\(([\w-]+\.png)\)", page) == list(pictures)
    assert page.count("```") % 2 == 0


def test_a_cell_shows_what_it_prints_and_its_last_value() -> None:
    both, _, picture = notebooks.run(
        made(
            "a = 1\nprint('said')\na + 1",
            "None",
            "from PIL import Image\nImage.new('RGB', (3, 2))",
        )
    )
    assert [notebooks._comparable(output) for output in both] == ["said\n", "2"]
    assert [notebooks._comparable(output) for output in picture] == ["3 x 2 pixels"]
    with pytest.raises(ZeroDivisionError):
        notebooks.run(made("1 / 0"))


def test_a_change_is_told_and_rounding_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(made("print('p', 0.5)")))
    assert list(notebooks.changes(path))
    notebooks.write(path)
    assert not list(notebooks.changes(path))
    assert not list(tmp_path.glob("*.png"))
    for text, same in (("p 0.51", True), ("p 0.55", False), ("q 0.5", False), ("p", False)):
        assert notebooks._same("p 0.5\n", text) is same


def test_a_large_picture_is_stored_with_fewer_colours() -> None:
    noise = Image.effect_noise((350, 350), 90).convert("RGB")
    assert len(noise._repr_png_()) > notebooks.LARGEST
    assert len(notebooks._small(noise)) <= notebooks.LARGEST
