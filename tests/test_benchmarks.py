"""What all benchmarks share: the text form, samples and records, files, tables and the hub."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from foveate import FoveateError
from foveate.benchmarks.mme import MME
from foveate.benchmarks.pope import POPE
from foveate.benchmarks.rbench import RBench
from foveate.evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Problems,
    Sample,
    Table,
    benchmarks,
    parse,
)
from foveate.evaluation.data import Data
from tests.goldens import records


@dataclass(frozen=True)
class Small(Benchmark):
    """Questions from one file; registered under no name."""

    hub: ClassVar[tuple[str, ...]] = ("someone/small",)
    origin: ClassVar[str] = "from nowhere"

    def read(self, data: Data) -> Iterator[Sample]:
        for line, row in data.rows(data.need("small/questions.json"), "id", "text"):
            image = data.image(row["image"], "small/images", "small") if "image" in row else None
            yield Sample("all", line, str(row["id"]), row["text"], row["text"], "", image)

    def score(self, records: Any) -> dict[str, float]:
        return {}

    def table(self, scores: dict[str, float]) -> Table:
        return [], []


def write(root: Path, text: str, name: str = "questions.json") -> Path:
    (root / "small").mkdir(exist_ok=True)
    path = root / "small" / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return root


ROWS = [{"id": i, "text": f"q{i}"} for i in range(6)]


# -- the classes -----------------------------------------------------------------------------------


def test_every_benchmark_says_what_it_is_and_reads_its_own_text_form() -> None:
    found = benchmarks()
    assert {"amber", "amber_captions", "pope", "rbench", "mme"} <= set(found)
    for name, cls in found.items():
        assert cls.title, name
        assert cls.__doc__, name
        assert parse(str(cls())) == (cls(),)
        assert cls().score([]) == {}, name
        columns, rows = cls().table({})
        assert all(len(row) == len(columns) for row in rows), name


def test_options_are_in_the_text_form() -> None:
    (pope,) = parse('pope(parser=lmms, suffix=" Please answer yes or no.")')
    assert pope == POPE(parser="lmms", suffix=" Please answer yes or no.")
    assert parse(str(pope)) == (pope,)
    assert [b.name for b in parse("pope(source=gqa)+amber")] == ["pope", "amber"]
    with pytest.raises(FoveateError, match="did you mean 'pope'"):
        parse("pop")
    with pytest.raises(FoveateError, match="parser must be 'official' or"):
        parse("pope(parser=best)")
    with pytest.raises(FoveateError, match="max_new_tokens must be 1 or more"):
        parse("pope(max_new_tokens=0)")


@pytest.mark.parametrize("name", ["amber", "pope", "rbench", "mme"])
def test_yes_no_benchmarks_allow_16_tokens(name: str) -> None:
    assert benchmarks()[name]().max_new_tokens == 16


def test_a_picture_is_a_file_bytes_or_a_call(tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 9), "red")
    picture.save(tmp_path / "red.png")
    encoded = (tmp_path / "red.png").read_bytes()
    for image in (tmp_path / "red.png", encoded, lambda: encoded, lambda: picture):
        loaded = Sample("all", 0, "1", "", "", "", image).load()
        assert loaded is not None
        assert loaded.getpixel((4, 4)) == (255, 0, 0)
    assert Sample("all", 0, "1", "", "", "").load() is None
    with pytest.raises(FoveateError, match="not a picture"):
        Sample("all", 0, "1", "", "", "", b"text").load()


def test_one_answer_is_right_wrong_or_missing() -> None:
    record: EvalRecord = {"label": "yes", "answer": "yes, it is", "meta": {}}
    assert POPE().correct(record) == 1
    assert POPE().correct({**record, "label": "no"}) == 0
    assert POPE(parser="lmms").correct(record) == 0
    assert POPE().correct({**record, "answer": None}) is None


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions.json", "questions.json.gz"])
@pytest.mark.parametrize("shape", ["array", "pretty", "lines", "spaced lines"])
def test_arrays_and_lines_packed_or_not(tmp_path: Path, shape: str, name: str) -> None:
    text = {
        "array": json.dumps(ROWS),
        "pretty": "\ufeff" + json.dumps(ROWS, indent=4),
        "lines": "\n".join(map(json.dumps, ROWS)),
        "spaced lines": "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    }[shape]
    problems = Problems()
    samples = Small().samples(write(tmp_path, text, name), problems)
    assert [(s.line, s.id) for s in samples] == [(i, str(i)) for i in range(6)]
    assert not problems
    assert problems.lines() == []


@pytest.mark.parametrize("shape", ["array", "lines"])
def test_a_file_cut_short_keeps_what_is_whole(tmp_path: Path, shape: str) -> None:
    text = json.dumps(ROWS) if shape == "array" else "\n".join(map(json.dumps, ROWS))
    problems = Problems()
    samples = Small().samples(write(tmp_path, text[:-12]), problems)
    assert [s.line for s in samples] == [0, 1, 2, 3, 4]
    assert problems.lines() == ["1 broken lines: questions.json entry 6"]


def test_broken_lines_keep_their_position_and_are_counted(tmp_path: Path) -> None:
    lines = [*map(json.dumps, ROWS)]
    lines[1], lines[3], lines[4] = '{"id": 1, "te', "[1]", '{"id": 4}'
    problems = Problems()
    samples = Small().samples(write(tmp_path, "\n".join(lines)), problems)
    assert [s.line for s in samples] == [0, 2, 5]
    assert problems.counts == {"broken lines": 3}


def test_repeated_ids_are_kept_and_counted(tmp_path: Path) -> None:
    problems = Problems()
    rows = [*ROWS, {"id": 2, "text": "again"}]
    assert len(Small().samples(write(tmp_path, json.dumps(rows)), problems)) == 7
    assert problems.lines() == ["1 repeated ids: 2 2 times in all"]


def test_nothing_left_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no question in .*1 broken lines"):
        Small().samples(write(tmp_path, '{"id": 1'))
    with pytest.raises(FoveateError, match="not valid JSON"):
        Data(Small(), tmp_path, Problems()).json(tmp_path / "small" / "questions.json")
    (tmp_path / "small" / "questions.json").unlink()
    with pytest.raises(
        FoveateError,
        match=r"small/questions.json is missing: put it there \(from nowhere, .* someone/small\)",
    ):
        Small().samples(tmp_path)
    with pytest.raises(FoveateError, match="is not a folder"):
        Small().samples(tmp_path / "elsewhere")
    packed = write(tmp_path, json.dumps(ROWS), "questions.json.gz") / "small/questions.json.gz"
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(FoveateError, match=r"questions.json.gz is cut short"):
        Small().samples(tmp_path)


def test_a_list_inside_an_object(tmp_path: Path) -> None:
    root = write(tmp_path, json.dumps({"data": [ROWS[0], 7], "other": 1}))
    problems = Problems()
    data = Data(Small(), root, problems)
    path = data.need("small/questions.json")
    assert list(data.entries(path, "data", "id")) == [(0, ROWS[0])]
    assert problems.counts == {"broken lines": 1}
    with pytest.raises(FoveateError, match="holds no list 'rows'"):
        data.entries(path, "rows")


def test_images_are_found_by_the_end_of_their_path_whatever_the_case(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/VD/sub/0_1.PNG", "images/VS/sub/0_1.png", "extra/b.jpg"):
        (tmp_path / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / name).touch()
    wanted = {
        "a.jpg": "images/a.jpg",
        "A.JPG": "images/a.jpg",
        "./VD/sub/0_1.png": "images/VD/sub/0_1.PNG",
        "/bench/vs/SUB/0_1.png": "images/VS/sub/0_1.png",
        "bench\\VS\\sub\\0_1.png": "images/VS/sub/0_1.png",
        "b.jpg": "extra/b.jpg",
    }
    rows = [{"id": i, "text": "", "image": name} for i, name in enumerate([*wanted, "c.jpg"])]
    problems = Problems()
    samples = Small().samples(write(tmp_path, json.dumps([*rows, rows[-1]])), problems)
    found = [s.image for s in samples]
    assert found[:-2] == [tmp_path / "small" / name for name in wanted.values()]
    assert found[-1] == tmp_path / "small" / "images" / "c.jpg"  # where it should be
    assert problems.counts == {"missing images": 1, "repeated ids": 1}


def test_no_image_at_all_is_one_sentence(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "", "image": "a.jpg"}]
    with pytest.raises(FoveateError, match=r"not one image is there.*small/images/a.jpg"):
        Small().samples(write(tmp_path, json.dumps(rows)))


def test_problems_show_the_first_cases_of_each_kind() -> None:
    problems = Problems()
    for case in "abcde":
        problems.add("missing images", case)
    problems.add("broken lines", "x")
    assert problems.lines() == ["5 missing images: a, b, c, ...", "1 broken lines: x"]
    assert problems


# -- tables ----------------------------------------------------------------------------------------


def encoded(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def pope_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": str(i),
            "question": f"Is there a {i}?",
            "answer": "yes" if i % 2 else "no",
            "image_source": f"COCO_{i // 2}",
            "image": {"bytes": encoded(("red", "lime", "blue")[i // 2]), "path": f"{i // 2}.png"},
            "category": "popular" if i < 4 else "random",
        }
        for i in range(6)
    ]


def check_pope(samples: list[Sample]) -> None:
    assert [(s.split, s.line) for s in samples] == [
        *(("popular", line) for line in range(4)),
        ("random", 0),
        ("random", 1),
    ]
    assert [s.label for s in samples] == ["no", "yes"] * 3
    assert [s.image_name for s in samples] == [f"COCO_{i // 2}" for i in range(6)]
    for sample, colour in ((samples[0], (255, 0, 0)), (samples[5], (0, 0, 255))):
        picture = pickle.loads(pickle.dumps(sample)).load()  # as a worker process gets it
        assert picture is not None
        assert picture.getpixel((0, 0)) == colour


@pytest.mark.parametrize("home", ["pope", "pope/data"])
def test_parquet_files_of_the_hub(tmp_path: Path, home: str) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `eval` is not installed")
    import pyarrow.parquet

    (tmp_path / home).mkdir(parents=True)
    table = arrow.Table.from_pylist(pope_rows())
    pyarrow.parquet.write_table(table, tmp_path / home / "test.parquet", row_group_size=4)
    check_pope(POPE().samples(tmp_path))
    with pytest.raises(FoveateError, match=r"pope/coco_e3e3926/coco_pope_random.json is missing"):
        POPE(version="e3e3926").samples(tmp_path)
    other = tmp_path / "other" / "pope"
    other.mkdir(parents=True)
    pyarrow.parquet.write_table(table.drop_columns(["category"]), other / "test.parquet")
    with pytest.raises(FoveateError, match="no column category"):
        POPE().samples(other.parent)


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `eval` is not installed")
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(FoveateError, match="is damaged or cut short"):
        POPE().samples(tmp_path)


def test_a_saved_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `eval` is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(arrow.Table.from_pylist(pope_rows()), path)
    datasets.load_dataset("parquet", data_files=str(path))["train"].save_to_disk(tmp_path / "pope")
    check_pope(POPE().samples(tmp_path))
    with pytest.raises(FoveateError, match=r"pope/coco_e3e3926/coco_pope_random.json is missing"):
        POPE(version="e3e3926").samples(tmp_path)


def test_the_hub_tries_every_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `eval` is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    import pyarrow.parquet

    (tmp_path / "test").mkdir()
    pyarrow.parquet.write_table(
        arrow.Table.from_pylist(pope_rows()), tmp_path / "test" / "test-0.parquet"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(POPE, "hub", (str(tmp_path / "renamed"), str(tmp_path / "test")))
    check_pope(POPE().samples())
    monkeypatch.setattr(POPE, "hub", (str(tmp_path / "renamed"),))
    with pytest.raises(FoveateError, match=r"renamed cannot be loaded .*--data-root DIR"):
        POPE().samples()


def test_without_the_package_or_a_hub_id_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[eval\]', or give --data-root"):
        POPE().samples()
    with pytest.raises(FoveateError, match=r"--data-root DIR with DIR/pope/output/seem/gqa"):
        POPE(source="gqa").samples()


def test_mme_and_rbench_read_their_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `eval` is not installed")
    import pyarrow.parquet

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).mkdir()
        table = arrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / name / "test.parquet")

    order = [("OCR", 0), ("color", 0), ("OCR", 1), ("color", 0), ("OCR", 0), ("OCR", 1)]
    seen: dict[tuple[str, int], int] = {}
    rows = []
    for task, i in order:
        turn = seen[task, i] = seen.get((task, i), 0) + 1
        rows.append(
            {
                "question_id": f"{task}/{i}.png",
                "question": f"{task} {i} {turn}? Please answer yes or no.",
                "answer": ("Yes", "No")[turn - 1],
                "category": task,
                "image": {"bytes": encoded("red"), "path": None},
            }
        )
    save("mme", rows)
    problems = Problems()
    samples = MME().samples(tmp_path, problems)
    assert not problems
    assert sorted((s.split, s.line, s.question[:7]) for s in samples) == [
        ("OCR", 0, "OCR 0 1"),
        ("OCR", 1, "OCR 0 2"),
        ("OCR", 2, "OCR 1 1"),
        ("OCR", 3, "OCR 1 2"),
        ("color", 0, "color 0"),
        ("color", 1, "color 0"),
    ]
    scores = MME().score(records(samples, ["Yes", "No"] * 3))
    assert scores["OCR/score"] == scores["color/score"] == 200

    save(
        "rbench",
        [
            {
                "question_id": i,
                "question": f"r{i}?",
                "label": ("Yes", "No")[i % 2],
                "qtype": "Positive",
                "level": level,
                "image": {"bytes": encoded("red"), "path": f"{i // 2}.jpg"},
            }
            for i, level in enumerate(["image"] * 4 + ["instance", "image"])
        ],
    )
    samples = RBench().samples(tmp_path, problems)
    assert [s.line for s in samples] == [0, 1, 2, 3, 5]
    assert [s.image_name for s in samples] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg", "2.jpg"]
    assert problems.counts == {"rows of another level": 1, "missing subset lists": 5}
    assert set(RBench().score(records(samples, ["Yes", "No", "Yes", "No", "No"]))) == {
        f"all/{key}" for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }
