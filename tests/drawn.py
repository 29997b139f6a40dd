"""Drawn scenes as a copy of POPE's COCO questions: a data root that needs no download.

python -m tests.drawn FOLDER 40    # 40 questions per split
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from foveate.benchmarks.pocket import PocketBench
from foveate.benchmarks.pope import SPLITS


def pope(root: Path, questions: int) -> Path:
    """Question files and pictures in POPE's layout under `root`.

    Args:
        questions: per split, an even number; the scenes are pocket-bench's, with the habit.
    """
    home, pictures = root / "pope" / "output" / "coco", root / "coco" / "val2014"
    for folder in (home, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        bench = PocketBench(categories=(f"existence-{split}",), questions=questions)
        lines = []
        for sample in bench.samples():
            if sample.split.endswith("/with"):
                file = pictures / f"{sample.image_name}.png"
                if not file.exists():
                    sample.load().resize((96, 96)).save(file)
                lines.append(
                    {
                        "question_id": len(lines) + 1,
                        "image": file.name,
                        "text": sample.question,
                        "label": sample.label,
                    }
                )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home / f"coco_pope_{split}.json").write_text(text, "utf-8")
    return root


if __name__ == "__main__":
    print(pope(Path(sys.argv[1]), int(sys.argv[2])))
