"""Formulas of the site; `mkdocs.yml` names this file under `hooks`.

Pages write formulas as GitHub reads them: ``$`x_1`$`` in a line, and blocks fenced as ``math``. The
site shows them as MathML, which browsers draw by themselves, without a script.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)```math\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`([^`]+)`\$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = BLOCK.sub(lambda found: textwrap.indent(block(found[2]), found[1]), markdown)
    # the span keeps Markdown from taking a formula at the start of a line for a block
    return INLINE.sub(lambda found: f"<span>{convert(found[1])}</span>", markdown)


def block(latex: str) -> str:
    return f'<div class="formula">{convert(" ".join(latex.split()), display="block")}</div>'
