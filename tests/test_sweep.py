"""Sweeps: what is tried, the numbers beside vanilla, the figure, and one sentence for mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image

from foveate import VLM, FoveateError, commands
from foveate.base import stats
from foveate.core.method import text
from foveate.evaluation import sweep as sweep_module
from foveate.evaluation.benchmark import Benchmark, EvalRecord, Sample, parse
from foveate.evaluation.data import Data
from foveate.evaluation.points import Point
from foveate.evaluation.run import Plan
from foveate.evaluation.sweep import Axis, Sweep, SweepGrid, best, sweep
from foveate.evaluation.yesno import Counts
from foveate.insight.plots.sweep import show_sweep
from tests import models


def values(*over: str, method: str = "clvs") -> list[tuple[Any, ...]]:
    return [axis.values for axis in SweepGrid.read(method, over).axes]


# -- what is tried ---------------------------------------------------------------------------------


def test_values_and_ranges() -> None:
    assert values("smoothing=0.9, 0.5,1") == [(0.5, 0.9, 1.0)]
    assert values("smoothing=0.5..1.0/0.1") == [(0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert values("smoothing=0.5..1.0/0.2,0.75") == [(0.5, 0.7, 0.75, 0.9)]  # 1.0 is not met
    assert values("smoothing=.1..3e-1/1e-1") == [(0.1, 0.2, 0.3)]
    assert values("stop_threshold=-0.5..0.5/.5") == [(-0.5, 0.0, 0.5)]
    [counts] = values("top_k=2..6/2")
    assert counts == (2, 4, 6)
    assert all(type(count) is int for count in counts)


def test_values_that_are_no_numbers_stay_in_order() -> None:
    assert values("pool=mean,max,mean") == [("mean", "max")]
    assert values("unified_positions=visual,true,False") == [("visual", True, False)]
    assert values("layers=(2, 3),(0,),None,[1,2]") == [((2, 3), (0,), None, (1, 2))]
    assert values("beta=None,0.5") == [(None, 0.5)]


def test_settings_are_methods() -> None:
    grid = SweepGrid.read("clvs(top_k=5, smoothing=0.1)", ["smoothing=0.8,0.5", "beta=0.5..1/0.5"])
    assert {key: text(stack) for key, stack in grid.settings.items()} == {
        (0.5, 0.5): "clvs(smoothing=0.5, beta=0.5, top_k=5)",
        (0.5, 1.0): "clvs(smoothing=0.5, beta=1.0, top_k=5)",
        (0.8, 0.5): "clvs(beta=0.5, top_k=5)",
        (0.8, 1.0): "clvs(beta=1.0, top_k=5)",
    }


def test_a_value_may_depend_on_another() -> None:
    """Above 1 only in another mode: checked with the values together, not one by one."""
    [stack] = SweepGrid.read("clvs", ["smoothing=1.2", "mode=add"]).settings.values()
    assert text(stack) == "clvs(smoothing=1.2, mode='add')"


def test_a_method_of_a_stack() -> None:
    grid = SweepGrid.read("clvs+vaf", ["clvs.layers=(1,),(2,)", "smoothing=0.7"])
    assert [text(stack) for stack in grid.settings.values()] == [
        "clvs(smoothing=0.7, layers=(1,))+vaf",
        "clvs(smoothing=0.7, layers=(2,))+vaf",
    ]


@pytest.mark.parametrize(
    ("method", "over", "said"),
    [
        ("clvs", ["smothing=1"], "clvs has no parameter 'smothing'; there are smoothing, beta,"),
        ("clvs", ["pai.smoothing=1"], "clvs has no parameter 'pai.smoothing'"),
        ("clsv", ["smoothing=1"], "There is no method 'clsv' (did you mean 'clvs'?)"),
        ("vanilla", ["smoothing=1"], "vanilla has no parameters"),
        ("clvs+vaf", ["layers=(1,)"], "write clvs.layers or vaf.layers"),
        ("clvs", ["smoothing"], "Cannot read --over 'smoothing'"),
        ("clvs", ["=0.5"], "Cannot read --over '=0.5'"),
        ("clvs", ["smoothing=0.5,,0.6"], "Cannot read --over 'smoothing=0.5,,0.6'"),
        ("clvs", ["smoothing=0.5..1.0"], "Cannot read the range '0.5..1.0'"),
        ("clvs", ["smoothing=0.5..1.0/0"], "Cannot read the range '0.5..1.0/0'"),
        ("clvs", ["smoothing=1..0.5/0.1"], "Cannot read the range '1..0.5/0.1'"),
        ("clvs", ["smoothing=1...2/0.1"], "Cannot read the range '1...2/0.1'"),
        ("clvs", ["smoothing=0..1/1e-9"], "has 1,000,000,001 values, at most 1,000"),
        ("clvs", ["smoothing=0..1/0.01", "beta=0..1/0.01"], "The sweep has 10,201 settings"),
        ("clvs", ["smoothing=0.5..1.5/0.5"], "clvs: smoothing must lie between 0 and 1"),
        ("clvs", ["smoothing=high"], "clvs: smoothing must be a number, got 'high'"),
        ("clvs", ["smoothing=0.5)+vaf("], "Cannot read the value '0.5)+vaf('"),
        ("clvs", ["smoothing=(0.5"], "Cannot read the method 'clvs(smoothing=(0.5)'"),
        ("clvs", ["smoothing=0.5", "smoothing=0.6"], "smoothing is swept over twice"),
        ("clvs", ["smoothing=0.5", "clvs.smoothing=0.6"], "smoothing is swept over twice"),
        ("clvs", ["smoothing=0.5", "beta=1", "top_k=3"], "got 3 times --over"),
        ("clvs", [], "got 0 times --over"),
    ],
)
def test_bad_sweeps_are_one_sentence(method: str, over: list[str], said: str) -> None:
    with pytest.raises(FoveateError) as error:
        SweepGrid.read(method, over)
    assert said in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


# -- the numbers -----------------------------------------------------------------------------------

QUESTIONS, IMAGES = 24, 12


@dataclasses.dataclass(frozen=True)
class Doors(Benchmark):
    """Two questions about each of some images; half of the labels are yes."""

    def read(self, data: Data) -> Iterator[Sample]:
        for line in range(QUESTIONS):
            label, name = ("yes", "no")[line % 2], str(line // 2)
            yield Sample("all", line, str(line), "A door?", "A door?", label, image_name=name)

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        pairs = [(r["answer"], r["label"]) for r in records if r["answer"] is not None]
        return {f"all/{k}": v for k, v in Counts.of(pairs, "yes").percent().items()}

    def table(self, scores: dict[str, float]) -> Any:
        return ["Score", "Value"], [[name, value] for name, value in scores.items()]


Doors.name = "doors"  # after the class: in no registry

Answers = dict[str, Callable[[int], str | None]]  # method -> line -> what it says
Swept = Callable[..., Sweep]


def right(line: int) -> str:
    return ("yes", "no")[line % 2]


def wrong(line: int) -> str:
    return ("no", "yes")[line % 2]


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Swept:
    """A sweep over a run whose answers are given."""

    def call(answers: Answers, *over: str, **options: Any) -> Sweep:
        def fake(plan: Plan, vlm: Any, watch: Any) -> None:
            names, out = list(plan.stacks), plan.out
            assert set(names) == set(answers)
            run = {"model": "pocket", "methods": names, "benchmarks": ["doors"], "limit": None}
            (out / "run.json").write_text(json.dumps(run))
            samples = Doors().samples()
            rows = [
                {"benchmark": "doors", "split": s.split, "line": s.line, "id": s.id, "meta": {},
                 "image": s.image_name, "question": s.question, "prompt": s.prompt,
                 "label": s.label, "method": name, "answer": answers[name](s.line),
                 "error": None if answers[name](s.line) else "out of memory"}
                for s in samples for name in names
            ]  # fmt: skip
            (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        monkeypatch.setattr(sweep_module, "evaluate", fake)
        model = models.build("llava")
        vlm: Any = SimpleNamespace(name="pocket", revision=None, commit=None, model=model)
        grid = SweepGrid.read("clvs", over)
        return sweep(grid, Plan([Doors()], grid.methods, tmp_path), vlm, **options)

    return call


FIRST_WRONG: Answers = {
    "vanilla": lambda line: wrong(line) if line < 12 else right(line),
    "clvs(smoothing=0.5)": lambda line: wrong(line) if line < 15 else right(line),
    "clvs": right,
}


def test_accuracy_beside_vanilla(swept: Swept, tmp_path: Path) -> None:
    found = swept(FIRST_WRONG, "smoothing=0.5,0.8")
    assert (found.questions, found.images, found.vanilla) == (24, 12, 50.0)
    assert (found.metric, found.unit, found.notes[1:]) == ("accuracy", "%", [])
    worse, better = found.points
    assert (worse.values, worse.method) == ((0.5,), "clvs(smoothing=0.5)")
    assert (worse.value, worse.difference) == (37.5, -12.5)
    assert (worse.gained, worse.lost, worse.p) == (0, 3, 0.25)
    assert (better.value, better.difference) == (100.0, 50.0)
    assert (better.gained, better.lost, better.p) == (12, 0, 2 / 2**12)
    assert (worse.corrected, better.corrected) == (0.25, 4 / 2**12)  # Holm over both
    changes = [100.0 * (line < 12) for line in range(24)]
    ends = stats.interval(changes, [line // 2 for line in range(24)])
    assert (better.low, better.high) == ends
    assert better.apart
    assert found.axes == (Axis("smoothing", (0.5, 0.8), 0.8),)
    assert found.choice is not None
    assert (found.choice.method, found.choice.values) == ("clvs", (0.8,))
    assert found.choice.images + found.choice.held_out_images == 12
    assert best(found).startswith("Best: clvs, chosen on 12 questions about 6 images")
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(found)))


def test_a_score_of_the_benchmarks(swept: Swept) -> None:
    found = swept(FIRST_WRONG, "smoothing=0.5,0.8", metric="all/f1")
    worse, better = found.points
    assert found.vanilla == pytest.approx(50.0)
    assert worse.value == pytest.approx(100 * 2 * 4 / (2 * 4 + 8 + 7))
    assert better.value == pytest.approx(100.0)
    assert better.low is not None
    assert better.high is not None
    assert 0 < better.low < 50 < better.high
    assert (better.gained, better.p, better.corrected) == (None, None, None)


def test_a_mean_has_the_same_interval_by_either_way(swept: Swept) -> None:
    """Pseudo-values of a mean are the means of the images."""
    mean = swept(FIRST_WRONG, "smoothing=0.5,0.8").points
    score = swept(FIRST_WRONG, "smoothing=0.5,0.8", metric="all/accuracy").points
    for one, other in zip(mean, score, strict=True):
        assert one.difference == pytest.approx(other.difference)
        assert one.low == pytest.approx(other.low)
        assert one.high == pytest.approx(other.high)


def test_an_unknown_score_is_refused_with_the_names(swept: Swept, tmp_path: Path) -> None:
    said = (
        "doors has no score 'f1'; there are accuracy, all/accuracy, all/precision, all/recall, "
        "all/f1, all/yes_ratio."
    )
    with pytest.raises(FoveateError) as error:
        swept(FIRST_WRONG, "smoothing=0.5,0.8", metric="f1")
    assert str(error.value) == said
    assert not list(tmp_path.iterdir())  # before anything was asked


def test_a_score_that_is_not_defined_is_told(swept: Swept) -> None:
    never: Answers = dict.fromkeys(FIRST_WRONG, lambda line: "no")
    with pytest.raises(FoveateError, match="all/precision is not defined for vanilla's 24 answers"):
        swept(never, "smoothing=0.5,0.8", metric="all/precision")
    some = never | {"vanilla": right}
    [first, second] = swept(some, "smoothing=0.5,0.8", metric="all/precision").points
    assert (first.value, first.low, second.value) == (None, None, None)


def test_all_numbers_are_about_the_same_questions(swept: Swept) -> None:
    gaps: Answers = FIRST_WRONG | {
        "clvs(smoothing=0.5)": lambda line: None if line < 6 else right(line),
        "clvs(smoothing=0.6)": lambda line: None,
    }
    found = swept(gaps, "smoothing=0.5,0.6,0.8")
    assert (found.questions, found.images) == (18, 9)
    assert found.vanilla == pytest.approx(100 * 12 / 18)
    assert [point.value for point in found.points] == [100.0, None, 100.0]
    assert found.notes[1:] == [
        "clvs(smoothing=0.6) answered no question.",
        "6 of 24 questions are left out, as not every setting answered them.",
    ]


def test_no_common_question_is_told(swept: Swept) -> None:
    silent: Answers = FIRST_WRONG | {"vanilla": lambda line: None}
    with pytest.raises(FoveateError, match=r"vanilla and some .* out of memory\.$"):
        swept(silent, "smoothing=0.5,0.8")


# -- the figure ------------------------------------------------------------------------------------


def drawn(found: Sweep, path: Path) -> str:
    """All words of the figure."""
    with mpl.rc_context({"svg.fonttype": "none"}):
        return " ".join(show_sweep(found, path).read_text().split())


def test_a_line_names_its_axes_and_n(swept: Swept, tmp_path: Path) -> None:
    found = swept(FIRST_WRONG, "smoothing=0.5,0.8")
    words = drawn(found, tmp_path / "line.svg")
    for said in (
        ">smoothing<",
        ">vanilla<",
        "95 % interval",
        "default, 0.8",
        "n = 24",
        "12 images",
        ">chosen on half<",
        "Best: clvs, chosen on",
    ):
        assert said in words


def test_a_map_writes_its_values_in(swept: Swept, tmp_path: Path) -> None:
    answers: Answers = {
        "vanilla": FIRST_WRONG["vanilla"],
        "clvs(smoothing=0.5, beta=0.5)": right,
        "clvs(smoothing=0.5, beta=0.8)": FIRST_WRONG["vanilla"],
        "clvs(beta=0.5)": FIRST_WRONG["clvs(smoothing=0.5)"],
        "clvs(beta=0.8)": lambda line: None,
    }
    found = swept(answers, "smoothing=0.5,0.8", "beta=0.5,0.8")
    words = drawn(found, tmp_path / "map.svg")
    numbers = (">100.00<", ">+50.00*<", ">37.50<", ">-12.50<", ">50.00<", ">+0.00<", "no value")
    names = (">smoothing<", ">beta<", ">vanilla<", "n = 24", "Dashed: chosen on half")
    for said in (*numbers, *names):
        assert said in words


def test_values_without_a_scale_are_not_joined(swept: Swept, tmp_path: Path) -> None:
    found = swept({"vanilla": right, "clvs(pool='mean')": right, "clvs": wrong}, "pool=mean,max")
    assert found.axes[0].default == "max"
    words = drawn(found, tmp_path / "words.svg")
    for said in (">mean<", ">max<", "default, max"):
        assert said in words


def test_a_setting_with_one_image_has_no_band(swept: Swept, tmp_path: Path) -> None:
    point = Point("clvs", (0.8,), 100.0, 50.0)
    found = swept(FIRST_WRONG, "smoothing=0.5,0.8")
    alone = dataclasses.replace(found, axes=(Axis("smoothing", (0.8,)),), points=[point])
    assert not point.apart
    assert "95 % interval<" not in drawn(alone, tmp_path / "one.svg")


# -- for real --------------------------------------------------------------------------------------

SMALL = "pocket(categories=('attribute',), questions=2)"
OVER = "smoothing=0.1,0.8"


def command(out: Path, *options: str) -> list[str]:
    return ["sweep", "clvs", "--over", OVER, "--bench", SMALL, "--out", str(out), *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep on the pocket model that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as stop:
        commands.main(command(out, "--device", "cpu"))
    assert stop.value.code == 0
    return out


def test_on_the_pocket_model(whole: Path) -> None:
    found = json.loads((whole / "sweep.json").read_text())
    assert (found["questions"], found["benchmark"]) == (4, SMALL.replace("',)", "',)"))
    assert [point["values"] for point in found["points"]] == [[0.1], [0.8]]
    assert found["axes"][0]["default"] == 0.8
    results = json.loads((whole / "results.json").read_text())
    assert list(results["benchmarks"][SMALL]["methods"]) == [
        "vanilla",
        "clvs(smoothing=0.1)",
        "clvs",
    ]
    assert len((whole / "records.jsonl").read_text().splitlines()) == 12
    with Image.open(whole / "sweep.png") as picture:
        assert picture.width > 1000


def test_a_stopped_sweep_goes_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        assert total == 12
        if done == 5:
            raise Stopped

    grid, vlm = SweepGrid.read("clvs", [OVER]), VLM.load("pocket", device="cpu")
    with pytest.raises(Stopped):
        sweep(grid, Plan(parse(SMALL), grid.methods, tmp_path), vlm, watch=stop)
    begun = (tmp_path / "records.jsonl").read_text()
    assert begun.count("\n") == 5
    with pytest.raises(SystemExit) as end:
        commands.main(command(tmp_path, "--device", "cpu"))
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "n = 4 questions" in said
    assert "No setting is named the best: choosing on one half of the images" in said
    assert "vanilla" in said
    assert (tmp_path / "records.jsonl").read_text().startswith(begun)
    assert (tmp_path / "sweep.json").read_text() == (whole / "sweep.json").read_text()


def test_another_score_of_the_same_run(whole: Path, tmp_path: Path) -> None:
    """Nothing is asked again, and n counts the questions that the score is about."""
    out = Path(shutil.copytree(whole, tmp_path / "copy"))
    with pytest.raises(SystemExit) as stop:
        commands.main(command(out, "--device", "cpu", "--metric", "attribute/with/accuracy"))
    assert stop.value.code == 0
    assert (out / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()
    found = json.loads((out / "sweep.json").read_text())
    assert (found["questions"], found["metric"]) == (2, "attribute/with/accuracy")
    [entries] = json.loads((out / "results.json").read_text())["benchmarks"].values()
    scores = {name: e["scores"][found["metric"]] for name, e in entries["methods"].items()}
    assert scores.pop("vanilla") == found["vanilla"]
    assert scores == {point["method"]: point["value"] for point in found["points"]}


def test_shards_end_in_one_figure(whole: Path, tmp_path: Path) -> None:
    grid, vlm = SweepGrid.read("clvs", [OVER]), VLM.load("pocket", device="cpu")
    first, last = (
        sweep(grid, Plan(parse(SMALL), grid.methods, tmp_path, shard=(number, 2)), vlm)
        for number in range(2)
    )
    assert 0 < first.questions < 4
    assert first.notes == ["Only 1 of 2 shards are here: questions are missing."]
    assert last.notes == []
    undisturbed = json.loads((whole / "sweep.json").read_text())
    assert json.loads(json.dumps(dataclasses.asdict(last))) == undisturbed
    assert json.loads((tmp_path / "sweep.json").read_text()) == undisturbed


def one_sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        commands.main(list(arguments))
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert said.err.startswith("foveate: ")
    assert said.err.count("\n") == 1
    return said.err


def test_mistakes_are_one_sentence(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["sweep", "clvs", "--over", "smoothing=0.2", "--bench", SMALL, "--out", str(whole)]
    assert "was begun with other settings (methods:" in one_sentence(capsys, *other)
    new = tmp_path / "new"
    two = [*command(new)[:4], "--bench", f"{SMALL}+pope", "--out", str(new)]
    assert "A sweep is about one benchmark" in one_sentence(capsys, *two)
    shape = ["--figure", str(tmp_path / "sweep.exe")]
    assert "cannot be drawn" in one_sentence(capsys, *command(new, *shape))
    assert not new.exists()  # refused before a folder was made
    score = one_sentence(capsys, *command(new, "--metric", "attribute/f1"))
    assert "pocket has no score 'attribute/f1'; there are accuracy, attribute/against/" in score
