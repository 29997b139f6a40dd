"""Question files as data roots, and the outputs of official scorers in ../shared.

What lies in ../shared, beside the repository, is read where it is and never copied. Tests that need
it are the stronger check and skip without it; tests/test_scorers.py needs only what is here.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from foveate.evaluation.benchmark import EvalRecord, Sample

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, BENCHDATA = SHARED / "golden", SHARED / "benchdata"
REASON = "the scorers' outputs (../shared/golden) are not beside this repository"
QUESTIONS = Path(__file__).parent / "references" / "questions"  # our own, in the official formats
needed = pytest.mark.skipif(not GOLDEN.is_dir(), reason=REASON)


def cases(benchmark: str, without: tuple[str, ...] = ()) -> list[Any]:
    """The folders of one benchmark's cases, for `parametrize`; one skipped case where absent."""
    if not GOLDEN.is_dir():
        return [pytest.param("absent", marks=pytest.mark.skip(reason=REASON))]
    found = sorted(p.name for p in (GOLDEN / benchmark).iterdir() if p.is_dir())
    return [name for name in found if name not in without]


def read(*parts: str) -> Any:
    """The content of a golden file: JSON, or a list for JSON lines, packed or not."""
    path = GOLDEN.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"golden/{'/'.join(parts)} is not there")
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def data_root(folder: Path, *images: str, source: Path = BENCHDATA) -> Path:
    """A data root in `folder`: links to the files of `source`, and empty files named `images`."""
    if not source.is_dir():
        pytest.skip("the question files (../shared/benchdata) are not beside this repository")
    for file in source.rglob("*"):
        target = folder / file.relative_to(source)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
    return folder


def records(samples: Iterable[Sample], answers: Iterable[str | None]) -> list[EvalRecord]:
    """What an evaluation would have recorded had a model given these answers."""
    return [
        {
            "split": sample.split,
            "line": sample.line,
            "id": sample.id,
            "image": sample.image_name,
            "prompt": sample.prompt,
            "label": sample.label,
            "answer": answer,
            "meta": json.loads(json.dumps(sample.meta)),
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]
