"""Every image-text-to-text type of transformers, as the survey found it and as it is now."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from tests.survey.table import FOUND, PAGE, page
from tests.survey.walk import status, types, walk


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(FOUND.read_text())


def test_the_page_says_what_was_found(found: dict[str, Any]) -> None:
    assert PAGE.read_text() == page(found), "run python tools/survey.py"


def test_every_type_is_right_or_refused_or_not_built(found: dict[str, Any]) -> None:
    for name, row in found["types"].items():
        assert "crash" not in row, name
        assert "no" not in row.get("checks", {}).values(), f"{name}: {status(row)}"


@pytest.mark.slow
def test_the_survey_finds_what_it_found(found: dict[str, Any]) -> None:
    if transformers.__version__ != found["transformers"]:
        pytest.skip(f"the survey is of transformers {found['transformers']}")
    assert walk(sorted(types())) == found["types"], "run python tools/survey.py and read the change"
