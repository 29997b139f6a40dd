"""Lists of heads in JSON: what is read, found and written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foveate import FoveateError
from foveate.base import headlist
from foveate.methods import adhh

SHAPE = {"model_type": "llava", "hidden_size": 64, "vocab_size": 9}


def test_a_list_is_read_sorted_and_without_repeats(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    for content in ([[3, 1], [0, 2], [3, 1]], {"heads": [[3, 1], [0, 2]], "model": SHAPE}):
        path.write_text(json.dumps(content))
        assert headlist.read(path, SHAPE) == ((0, 2), (3, 1))
        assert headlist.read(str(path), SHAPE) == ((0, 2), (3, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "adhh cannot read the file"),
        ("[[1, 2", "is not JSON"),
        ("3", "holds no list of [layer, head] pairs"),
        ("[[1, true]]", "holds no list"),
        ("[[1, -1]]", "holds no list"),
        ('{"heads": [], "model": 3}', '"model" must be an object such as {"model_type": "llava"'),
        ('{"heads": [], "model": {"hidden_size": 4096}}', "hidden_size 4096 instead of 64"),
    ],
)
def test_what_is_no_list_for_the_model_is_one_sentence(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FoveateError, match=re.escape(message)) as error:
        headlist.read(path, SHAPE)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_the_first_list_that_fits_is_found(tmp_path: Path) -> None:
    one, many, missing = (tmp_path / name for name in ("one.json", "many.json", "missing.json"))
    one.write_text(json.dumps({"heads": [[7, 7]], "model": SHAPE}))
    lists = [
        {"heads": [[1, 0]], "model": SHAPE | {"vocab_size": 10}},
        {"heads": [[2, 0], [1, 5]], "model": {"model_type": "llava", "hidden_size": 64}},
    ]
    many.write_text(json.dumps(lists))
    assert headlist.find((missing, many, one), SHAPE) == ((1, 5), (2, 0))  # any vocabulary
    assert headlist.find((one, many), SHAPE) == ((7, 7),)
    assert headlist.find((missing, many, one), SHAPE | {"hidden_size": 65}) is None


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    content = {"heads": [[1, 2], [0, 1]], "model": SHAPE, "scores": [[0.1, 0.2, 0.3]] * 2}
    headlist.write(path, content)
    assert json.loads(path.read_text()) == content
    assert path.read_text().splitlines()[-3:] == ["[0.1, 0.2, 0.3],", "[0.1, 0.2, 0.3]]", "}"]
    assert headlist.read(path, SHAPE) == ((0, 1), (1, 2))
    assert list(tmp_path.iterdir()) == [path]


def test_the_authors_lists_are_whole() -> None:
    """Three models; of the published length, each head once and within the model."""
    path = Path(adhh.__file__).with_name("adhh.json")
    lists = json.loads(path.read_text())
    assert [len(entry["heads"]) for entry in lists] == [20, 35, 10]
    for entry in lists:
        model = entry["model"]
        pairs = headlist.find((path,), model | {"vocab_size": 32064})
        assert pairs == tuple(sorted(map(tuple, entry["heads"])))
        assert len(pairs) == len(entry["heads"])
        assert all(0 <= la < model["layers"] for la, _ in pairs)
        assert all(0 <= he < model["attention_heads"] for _, he in pairs)
