"""Look at every image-text-to-text type of the installed transformers, and write what was found.

python tools/survey.py            writes tests/survey/found.json and the table in docs/models.md
python tools/survey.py llava ...  looks at these types only and writes nothing
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from tests.survey.table import FOUND, PAGE, page
from tests.survey.walk import types, walk


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = sys.argv[1:] or sorted(types())
    rows = walk(names, lambda line: print(line, flush=True))
    if sys.argv[1:]:
        print(json.dumps(rows, indent=1))
        return
    found: dict[str, Any] = {"transformers": transformers.__version__, "types": rows}
    FOUND.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
