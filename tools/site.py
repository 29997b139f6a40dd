"""What the site needs beyond its Markdown; `mkdocs.yml` names this file under `hooks`.

* An entry of the navigation that ends in `*` takes the pages that lie there. Without any it goes.
* Files of the repository that pages link to are on the site, too: `SHOWN`.
* Every notebook is a page, with the outputs that it holds.
* `<!-- commands -->` becomes the command line's reference, `<!-- errors -->` the list of errors.
* `<!-- not run: WHY -->`, before a block that no test runs, becomes a line that readers see.
* At the end, every page is searched for scripts, styles, fonts and pictures from other machines.

`make docs` builds the site, with warnings as errors.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import errors  # noqa: E402
import notebooks  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402

SHOWN = {  # a file of the repository, and its page
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_CONDUCT.md": "project/code-of-conduct.md",
    "CITATION.cff": "project/CITATION.cff",
    "LICENSE": "project/LICENSE",
    "src/foveate/pocket/weights/README.md": "evidence/pocket-model.md",
    **{
        f"benchmarks/results/{path.name}": f"evidence/results/{path.name}"
        for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    },
}
NOTEBOOKS = {  # a notebook, and its page
    f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md"
    for path in sorted(notebooks.FOLDER.glob("*.ipynb"))
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
REMOTE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>|@import"
)
HARMLESS = 'rel="canonical"'


def on_config(config: Any) -> Any:
    sys.path.insert(0, str(ROOT / "src"))  # the package is not installed for the site
    config.nav = list(_entries(config.nav, Path(config.docs_dir), set()))
    return config


def on_files(files: Any, config: Any) -> Any:
    for source, page in SHOWN.items():
        text = (ROOT / source).read_text("utf-8")
        if source.endswith("weights/README.md"):  # its head is for the model hub
            text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        files.append(File.generated(config, page, content=text))
    for source, page in NOTEBOOKS.items():
        text, pictures = notebooks.markdown(ROOT / source)
        files.append(File.generated(config, page, content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    source = next((s for s, shown in SHOWN.items() if shown == here), f"docs/{here}")
    if "<!-- errors -->" in markdown:
        markdown = markdown.replace("<!-- errors -->", errors.markdown())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n".join(_commands()))
    markdown = re.sub(
        r"<!-- not run: (.*?) -->", r"*Not run by our tests: \1.*{ .not-run }", markdown
    )
    return LINK.sub(lambda found: _on_site(found[1], source, here), markdown)


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from elsewhere."""
    for path in Path(config.site_dir).rglob("*.html"):
        for found in REMOTE.finditer(path.read_text("utf-8")):
            if HARMLESS not in found[0]:
                raise PluginError(f"{path} loads something from elsewhere: {found[0][:200]}")


def _entries(nav: list[Any], docs: Path, listed: set[str]) -> Iterator[Any]:
    """The navigation with the pages that its stars stand for, each page once."""
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inside),) = entry.items()
            if isinstance(inside, list):
                inside = list(_entries(inside, docs, listed))
            elif "*" in inside:
                inside = next(_entries([inside], docs, listed), None)
            if inside:
                yield {title: inside}
        elif "*" in entry:
            found = (path.relative_to(docs).as_posix() for path in sorted(docs.glob(entry)))
            for page in found:
                if page not in listed:
                    listed.add(page)
                    yield page
        else:
            listed.add(entry)
            yield entry


def _on_site(link: str, source: str, here: str) -> str:
    """A link as it stands in the repository, as the site has it."""
    path, mark, anchor = link.partition("#")
    if not path:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    inside = SHOWN.get(target) or NOTEBOOKS.get(target)
    if inside is None and target.startswith("docs/"):
        inside = target.removeprefix("docs/")
    if inside is None:  # mkdocs says that there is no such page
        return link
    return posixpath.relpath(inside, posixpath.dirname(here) or ".") + mark + anchor


def _commands() -> Iterator[str]:
    """Every command's usage, arguments and options, from the application itself."""
    import typer

    from foveate.commands import app

    root = typer.main.get_command(app)
    yield from _described("foveate", root, "##")


def _described(name: str, command: Any, level: str) -> Iterator[str]:
    if name != "foveate":
        yield from (f"{level} {name}", "", _sentences(command.help), "")
    rows = [_row(p) for p in command.params if not getattr(p, "hidden", False)]
    if rows:
        yield from ("| argument or option | | default |", "| --- | --- | --- |", *rows, "")
    deeper = level if name == "foveate" else level + "#"
    for inner, sub in getattr(command, "commands", {}).items():
        yield from _described(f"{name} {inner}", sub, deeper)


def _row(param: Any) -> str:
    name = ", ".join(f"`{option}`" for option in (*param.opts, *param.secondary_opts))
    if param.param_type_name == "argument":
        name = f"`{(param.metavar or param.name).upper()}`"
    default = param.default
    shown = "" if default in (None, False, (), "") or callable(default) else f"`{default}`"
    told = (getattr(param, "help", None) or "").replace("|", "\\|")
    return f"| {name} | {' '.join(told.split())} | {shown} |"


def _sentences(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))
