"""The site: its pages run, its links lead somewhere, and the list of errors is whole."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.scenes import questions, world
from tests import pages
from tools import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUN = sorted([*DOCS.glob("start/*.md"), *DOCS.glob("guides/*.md")])
TEXTS = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")})
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda path: path.stem)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    if not any(runs for _, _, runs in pages.blocks(page.read_text("utf-8"))):
        pytest.skip("nothing on it is run")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "pages.py", page],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("page", RUN, ids=lambda path: path.stem)
def test_blocks_can_be_read_also_those_that_are_not_run(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("```") % 2 == 0
    for kind, content, _ in pages.blocks(text):
        if kind == "python":
            ast.parse(content)
        else:
            assert pages.commands(content)
    unmarked = re.findall(r"^```\n(?=(?:foveate|pip|vllm|python|\$) )", text, re.MULTILINE)
    assert not unmarked, "commands stand in blocks marked `sh`, so that they are run"


def test_a_page_that_fails_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for block in ("```python\n1 / 0\n```\n", "```sh\nrm -r /\n```\n", "```sh\nfoveate no\n```\n"):
        page.write_text(block)
        with pytest.raises((ZeroDivisionError, AssertionError)):
            pages.run(page)
    page.write_text("<!-- not run: it fails -->\n```python\n1 / 0\n```\n")
    pages.run(page)


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in LINK.findall(text):
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS / "evidence") and not target.exists():
            continue  # made for the site; `make docs` looks
        assert target.exists(), f"{page}: {path}"
        if anchor and target.suffix == ".md" and "<!--" not in anchor:
            assert anchor in _anchors(target), f"{page}: {path}#{anchor}"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()).strip() for head in heads)
    return {re.sub(r"[ ]+", "-", head) for head in plain}


def test_the_list_of_errors_is_whole(tmp_path: Path) -> None:
    source = ROOT / "src" / "foveate"
    calls = sum(
        path.read_text("utf-8").count("raise FoveateError(") for path in source.rglob("*.py")
    )
    listed = errors.sentences()
    assert len(listed) > 0.9 * calls  # some only pass on the text of another
    texts = [sentence.text for sentence in listed]
    assert "The question is empty: ask something about the image." in texts
    assert any(text.startswith("There is no <kind> <shown>") for text in texts)
    rooms = {sentence.file.split("/")[0].removesuffix(".py") for sentence in listed}
    assert rooms <= set(errors.PARTS)
    (tmp_path / "vlm.py").write_text(
        "raise FoveateError(f\"{a.name} and {'b' if b else 'c'}: \" + \", \".join(names))"
    )
    told = [sentence.text for sentence in errors.sentences(tmp_path)]
    assert told == ["<a> and b: <names>", "<a> and c: <names>"]


def test_readme_is_short_and_leads_with_what_helps() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert text.index("laser") < text.index("clvs")


@pytest.mark.slow
def test_the_few_lines_of_the_readme_run_on_the_pocket_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    code = next(content for kind, content, _ in pages.blocks(text) if kind == "python")
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(ROOT / "src/foveate/pocket/weights"))
    code = code.replace(', device_map="auto"', "")  # needs Accelerate
    monkeypatch.chdir(tmp_path)
    world.draw(world.sample(questions.FIRST_HELD_OUT)).save("photo.jpg")
    exec(compile(code, "README.md", "exec"), {})
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said == [["vanilla", "no"], ["clvs", "no"]]  # there is no cup
