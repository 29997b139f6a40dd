"""Runs: whatever happens to them, their records are those of an undisturbed one."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError, Method, commands
from foveate.base.memory import Size
from foveate.benchmarks.pocket import PocketBench
from foveate.core.method import as_stack
from foveate.evaluation import ask as evaluation
from foveate.evaluation import run
from foveate.evaluation.ask import Asker, evaluate
from foveate.evaluation.benchmark import Benchmark, EvalRecord, Sample, by_split, parse
from foveate.evaluation.data import Data
from foveate.evaluation.merge import merge, read_runs
from foveate.evaluation.run import (
    RECORDS,
    RESULTS,
    RUN,
    SESSIONS,
    Plan,
    Question,
    Run,
    read_run,
)
from foveate.scenes import world
from foveate.vlm import answering, look
from foveate.vlm.chat import Chat

ROOT = Path(__file__).parent.parent
THINGS = ("car", "tree", "house", "cat")


@dataclasses.dataclass(frozen=True)
class Scenes(Benchmark):
    """Four questions of one or two words and a caption about each of some scenes."""

    max_new_tokens: int = 3
    images: int = 3
    captions: bool = True
    broken: tuple[int, ...] = ()
    texts: tuple[str, ...] = tuple(f"Is there a {thing} in the image?" for thing in THINGS)

    def read(self, data: Data) -> Iterator[Sample]:
        for number in range(self.images):
            image: Any = b"no image" if number in self.broken else functools.partial(drawn, number)
            for i, text in enumerate(self.texts):
                line = number * len(self.texts) + i
                yield self.sample("short", line, text, image, number)
            if self.captions:
                yield self.sample("captions", number, "Describe this image.", image, number)

    def sample(self, split: str, line: int, text: str, image: Any, number: int) -> Sample:
        meta = {"max_new_tokens": 6} if split == "captions" else {}
        return Sample(split, line, str(line), text, text, "yes", image, str(number), meta)

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        groups = by_split(records)
        shares = {s: sum(r["answer"] == "yes" for r in g) / len(g) for s, g in groups.items()}
        return {f"{split}/yes": share for split, share in shares.items()} | {"undefined": math.nan}

    def table(self, scores: dict[str, float]) -> Any:
        return ["split", "yes"], [[name, value] for name, value in scores.items()]


class Doubtful(Scenes):
    def read(self, data: Data) -> Iterator[Sample]:
        data.problems.add("broken lines", "entry 7")
        return super().read(data)


Scenes.name, Doubtful.name = "scenes", "doubtful"  # after the classes: in no registry


def drawn(number: int) -> Image.Image:
    return world.draw(world.sample(number), 96)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def read(folder: Path) -> dict[tuple[Any, ...], EvalRecord]:
    """Records by key, none twice."""
    lines = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    found = {(r["benchmark"], r["split"], r["line"], r["method"]): r for r in lines}
    assert len(found) == len(lines)
    return found


def answers(folder: Path, *without: str) -> dict[tuple[Any, ...], Any]:
    """What does not depend on the clock."""
    left_out = ("ms", *without)
    return {k: {n: v for n, v in r.items() if n not in left_out} for k, r in read(folder).items()}


def test_what_is_wrong_with_the_data_is_told(vlm: VLM, tmp_path: Path) -> None:
    b = Doubtful(images=1, captions=False)
    with pytest.warns(UserWarning, match="doubtful.*: 1 broken lines: entry 7"):
        results = evaluate(Plan([b], ["vanilla"], tmp_path), vlm)
    assert results["benchmarks"][str(b)]["problems"] == {"broken lines": 1}


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


# -- a whole run -----------------------------------------------------------------------------------


def test_a_run_from_end_to_end(vlm: VLM, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    results = evaluate(
        Plan([Scenes()], ["vanilla", "clvs"], tmp_path, seed=3),
        vlm,
        watch=lambda *a: seen.append(a),
    )
    records = read(tmp_path)
    assert len(records) == 2 * 3 * 5
    assert [done for done, _, _ in seen] == list(range(1, 31))
    assert {total for _, total, _ in seen} == {30}
    one = records["scenes", "short", 5, "clvs"]
    assert one["prompt"] == one["question"] == "Is there a tree in the image?"
    assert (one["image"], one["label"], one["error"], one["notes"]) == ("1", "yes", None, {})
    assert 0 < one["yes"] < 1
    assert 0 < one["probability"] <= 1
    assert one["ms"] > 0
    caption = records["scenes", "captions", 2, "vanilla"]
    assert caption["tokens"] == 6, "the sample's own limit"
    assert max(r["tokens"] for r in records.values() if r["split"] == "short") <= 3

    text = (tmp_path / RESULTS).read_text()
    assert json.loads(text, parse_constant=no_constant) == results
    assert results["run"] == read_run(tmp_path)
    assert results["run"]["methods"] == ["vanilla", "clvs"]
    entry = results["benchmarks"]["scenes"]["methods"]["clvs"]
    assert (entry["questions"], entry["errors"]) == (15, 0)
    assert entry["scores"]["undefined"] is None
    assert 0 <= entry["scores"]["short/yes"] <= 1
    assert results["benchmarks"]["scenes"]["options"]["max_new_tokens"] == 3
    stamp = results["environment"]
    assert stamp["torch"] == torch.__version__
    assert stamp["hardware"]
    assert stamp["git"] is None or len(stamp["git"].removesuffix("-dirty")) == 40
    assert (stamp["seed"], stamp["sessions"]) == (3, 1)
    assert stamp["wall_seconds"] > 0

    before = (tmp_path / RECORDS).read_bytes()
    again = evaluate(Plan([Scenes()], ["vanilla", "clvs"], tmp_path, seed=3), vlm)
    assert (tmp_path / RECORDS).read_bytes() == before, "nothing was left to ask"
    assert again["benchmarks"] == results["benchmarks"]
    assert again["environment"]["sessions"] == 2
    assert again["environment"]["started"] == stamp["started"]


@pytest.mark.parametrize("method", ["vanilla", "clvs", "vcd"])  # test_shared has all of them
def test_sharing_changes_no_answer(vlm: VLM, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, alone = Asker(vlm, [method]), Asker(vlm, [method], share=False)
    units = [unit for unit in questions(Scenes(images=1)) if len(unit) > 1]
    for unit in units:
        loaded = shared.load(unit)
        with monkeypatch.context() as patched:  # the image was processed ahead
            patched.setattr(VLM, "inputs", None)
            together = shared.answer(loaded, method)
        one_by_one = [r for q in unit for r in alone.answer(alone.load([q]), method)]
        for a, b in zip(together, one_by_one, strict=True):
            assert (a["answer"], a["tokens"]) == (b["answer"], b["tokens"])
            assert a["yes"] == pytest.approx(b["yes"], abs=1e-5)


def questions(b: Benchmark, shard: tuple[int, int] = (0, 1)) -> list[list[Question]]:
    return run._units(b, b.samples(), shard)


# -- killed and resumed ----------------------------------------------------------------------------

KILLED = ("vanilla", "clvs", "vcd")


def child(out: str) -> None:
    """A run that takes its time after every record, so that a kill falls between two."""
    torch.set_num_threads(1)
    run.HEARTBEAT = 0.0
    vlm = VLM.load("pocket", device="cpu")
    evaluate(Plan([Scenes()], KILLED, Path(out)), vlm, watch=lambda *_: time.sleep(0.1))


def start_and_kill(out: Path, lines: int) -> int:
    """Start a run, kill it once there are so many records; how many there are then."""
    code = f"from tests.test_evaluation import child; child({str(out)!r})"
    log = out.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=errors)
        try:
            deadline = time.monotonic() + 120
            while count(out) < lines and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(10) == -signal.SIGKILL, log.read_text()
    return count(out)


def count(out: Path) -> int:
    path = out / RECORDS
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
def test_a_killed_run_ends_as_an_undisturbed_one(vlm: VLM, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(Plan([Scenes()], KILLED, whole), vlm)
    first = start_and_kill(cut, 2)  # within the first batch
    assert 2 <= first < 45
    second = start_and_kill(cut, first + 9)  # in a later one
    assert first < second < 45
    assert not (cut / RESULTS).exists()
    with (cut / RECORDS).open("ab") as file:
        file.write(b'{"benchmark": "scenes", "split": "sho')
    results = evaluate(Plan([Scenes()], KILLED, cut), vlm)
    assert answers(cut) == answers(whole)
    assert list(read(cut)) == list(read(whole)), "in the same order, too"
    assert results["environment"]["sessions"] == 3
    rows = [json.loads(line) for line in (cut / SESSIONS).read_text().splitlines()]
    last = {row["started"]: row["seconds"] for row in rows}
    assert results["environment"]["wall_seconds"] == pytest.approx(sum(last.values()), abs=1)
    assert all(seconds > 0 for seconds in last.values())


def test_an_interrupted_batch_is_asked_again_as_it_was(vlm: VLM, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(Plan([Scenes()], ["vanilla"], whole), vlm)

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Plan([Scenes()], ["vanilla"], cut), vlm, watch=stop)
    assert count(cut) == 2
    sizes: list[int] = []
    asker = Asker(vlm, ["vanilla"])
    with Run(Plan([Scenes()], ["vanilla"], cut), vlm.source, "float32") as run:
        for job in run.jobs(32):
            sizes.append(len(job))
            run.keep(asker.answer(asker.load(job), "vanilla"))
    assert sizes == [4, 3, 4, 4], "the first image's questions, captions, the other images"
    assert answers(cut) == answers(whole)
    assert [r["yes"] for r in read(cut).values()] == [r["yes"] for r in read(whole).values()]


# -- what is refused -------------------------------------------------------------------------------


def test_another_configuration_is_refused(vlm: VLM, tmp_path: Path) -> None:
    evaluate(Plan([Scenes(images=1)], ["vanilla"], tmp_path), vlm)
    before = (tmp_path / RECORDS).read_bytes()

    def refused(
        benchmarks: list[Benchmark], methods: list[Any], sentence: str, **options: Any
    ) -> None:
        with pytest.raises(FoveateError, match=sentence) as error:
            evaluate(Plan(benchmarks, methods, tmp_path, **options), vlm)
        assert str(error.value).count("\n") == 0
        assert (tmp_path / RECORDS).read_bytes() == before

    one = [Scenes(images=1)]
    refused(one, ["clvs"], sentence="other settings .methods: .'vanilla'., now .'clvs'.")
    refused([Scenes(images=2)], ["vanilla"], sentence="other settings .benchmarks")
    refused(one, ["vanilla"], seed=1, sentence="seed: 0, now 1")
    refused(one, ["vanilla"], limit=2, sentence="limit: None, now 2")
    refused(one, ["vanilla"], shard=(0, 2), sentence="shard: None, now .0, 2.")
    refused(one, ["vanilla"], resume=False, sentence="already holds records")
    refused(one, ["vanilla", "vanilla"], sentence="method vanilla is given twice")
    refused(one * 2, ["vanilla"], sentence="benchmark .* is given twice")
    refused(one, ["vanilla"], shard=(2, 2), sentence="no shard 2/2: .* are 0/2 to 1/2")
    refused(one, ["vanilla"], batch_size=0, sentence="batch size must be 1 or more")
    refused(one, ["vanilla"], limit=0, sentence="limit must be 1 or more")
    refused(one, ["clvs(layers=(99,))"], sentence="layer 99 does not exist")

    rows = [json.loads(line) for line in before.splitlines()]
    rows[1]["prompt"] = "Is it night?"
    (tmp_path / RECORDS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        FoveateError, match=r"another question for .*, short, line 1: the data have"
    ):
        evaluate(Plan(one, ["vanilla"], tmp_path), vlm)


def test_methods_are_added_to_a_finished_run(vlm: VLM, tmp_path: Path) -> None:
    benchmarks: list[Benchmark] = [Scenes(images=1)]
    added = "clvs(stop_threshold=0.0)"
    with pytest.raises(FoveateError, match="holds no run to add methods to"):
        evaluate(Plan(benchmarks, [added], tmp_path, add=True), vlm)
    evaluate(Plan(benchmarks, ["vanilla"], tmp_path), vlm)
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(FoveateError, match="or add these methods to it with --add"):
        evaluate(Plan(benchmarks, [added], tmp_path), vlm)
    results = evaluate(Plan(benchmarks, [added], tmp_path, add=True), vlm)
    (entry,) = results["benchmarks"].values()
    assert list(entry["methods"]) == ["vanilla", added]
    assert entry["methods"]["vanilla"]["questions"] == entry["methods"][added]["questions"]
    assert (tmp_path / RECORDS).read_bytes().startswith(before)
    again = evaluate(Plan(benchmarks, ["vanilla", added], tmp_path), vlm)
    assert again["benchmarks"] == results["benchmarks"]


def test_a_folder_of_something_else_is_refused(vlm: VLM, tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text("{}\n")
    with pytest.raises(FoveateError, match="records of an unknown run"):
        evaluate(Plan([Scenes(images=1)], ["vanilla"], tmp_path), vlm)
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match="cannot be made a folder"):
        evaluate(Plan([Scenes(images=1)], ["vanilla"], tmp_path / "file" / "run"), vlm)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / RUN).write_text("[")
    with pytest.raises(FoveateError, match="no folder of a run"):
        evaluate(Plan([Scenes(images=1)], ["vanilla"], tmp_path / "other"), vlm)


# -- failures --------------------------------------------------------------------------------------


class Breaking(Method, register=False):
    """Fails, or runs out of memory, before a question that says so."""

    name = "breaking"

    def rewrite(self, vlm: Any, chats: list[Chat]) -> list[Chat]:
        for chat in chats:
            if "tree" in chat.text:
                raise ZeroDivisionError("no tree")
            if "house" in chat.text:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return chats


@pytest.mark.filterwarnings("ignore:Memory is short")
def test_bad_images_and_failing_questions_are_records(vlm: VLM, tmp_path: Path) -> None:
    b = Scenes(images=3, broken=(1,), texts=(*Scenes().texts, "What is <image>?"))
    results = evaluate(Plan([b], ["vanilla", Breaking()], tmp_path), vlm)
    records = read(tmp_path)
    assert len(records) == 2 * 3 * 6
    for (_, split, line, method), record in records.items():
        number = line if split == "captions" else line // 5
        assert (record["answer"] is None) == (record["error"] is not None)
        if number == 1:
            assert "not a picture that can be read" in record["error"]
        elif "<image>" in record["prompt"]:
            assert "stands for an image" in record["error"]
        elif method == "breaking" and "tree" in record["prompt"]:
            assert record["error"] == "ZeroDivisionError: no tree"
        elif method == "breaking" and "house" in record["prompt"]:
            assert record["error"] == "out of memory"
        else:
            plain = records[str(b), split, line, "vanilla"]
            assert record["answer"] == plain["answer"]
    entry = results["benchmarks"][str(b)]["methods"]["breaking"]
    assert entry["errors"] == 6 + 2 * 3
    assert entry["notes"][-1].startswith("12 of 18 failed, the first: ")
    assert (tmp_path / RESULTS).exists()


def test_everything_failing_is_no_score(vlm: VLM, tmp_path: Path) -> None:
    results = evaluate(Plan([Scenes(images=1, broken=(0,))], ["vanilla"], tmp_path), vlm)
    entry = results["benchmarks"]["scenes(images=1, broken=(0,))"]["methods"]["vanilla"]
    assert (entry["questions"], entry["errors"], entry["scores"]) == (5, 5, {})


def starving(vlm: VLM, most: int) -> Callable[..., Any]:
    """The model's forward with memory for so many rows."""
    forward = vlm.model.forward

    @functools.wraps(forward)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(*args, **kwargs)

    return limited


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Memory is short. going on with 1")
@pytest.mark.parametrize("method", ["vanilla", "clvs"])
def test_out_of_memory_halves_the_batch(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asker = Asker(vlm, [method])
    short, captions = questions(Scenes(images=4))[0], [u[0] for u in questions(Scenes(images=4))]
    calm = [asker.answer(asker.load(job), method) for job in (short, captions)]
    monkeypatch.setattr(vlm.model, "forward", starving(vlm, 1))
    with pytest.warns(UserWarning, match="going on with 2 questions at a time"):
        hungry = [asker.answer(asker.load(job), method) for job in (short, captions)]
    assert asker.size.now < 4
    for one, other in zip(calm, hungry, strict=True):
        assert [r["answer"] for r in one] == [r["answer"] for r in other]
        assert all(r["error"] is None for r in other)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:OutOfMemoryError. 4 questions are now asked one by one")
def test_memory_that_one_question_exceeds_does_not_slow_the_others(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = Asker(vlm, ["vanilla"])
    unit = questions(Scenes())[0]
    monkeypatch.setattr(vlm.model, "forward", starving(vlm, 0))
    with pytest.warns(UserWarning, match="Memory is short"):
        records = asker.answer(asker.load(unit), "vanilla")
    assert {r["error"] for r in records} == {"out of memory"}
    assert asker.size.now == 32


class Watched:
    """The model's forward: its rows are noted, apart for reading and for answering.

    Attributes:
        fails: told the rows of a forward that reads; where it says True, memory does not suffice.
    """

    def __init__(self, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.answered: list[int] = []
        self.fails: Callable[[int], bool] = lambda rows: False
        plain, forward, now = look.read, vlm.model.forward, [self.answered]

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            now[0].append(len(kwargs["input_ids"]))
            if now[0] is self.read and self.fails(now[0][-1]):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(*args, **kwargs)

        def reading(*args: Any, **options: Any) -> Any:
            now[0] = self.read
            try:
                return plain(*args, **options)
            finally:
                now[0] = self.answered

        monkeypatch.setattr(vlm.model, "forward", noted)
        monkeypatch.setattr(look, "read", reading)

    def run(self, vlm: VLM, method: str) -> tuple[list[EvalRecord], list[list[int]], list[int]]:
        """Records of a few jobs, and for each job the rows of its answers, and the most read."""
        vlm.readings.clear()
        vlm.size = Size(64)
        asker, records, answered, most = Asker(vlm, [method]), list[EvalRecord](), [], []
        for unit in [unit for unit in questions(Scenes(images=4)) if len(unit) > 1]:
            self.read.clear()
            self.answered.clear()
            records += asker.answer(asker.load(unit), method)
            answered.append(list(self.answered))
            most.append(max(self.read))
        return records, answered, most


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Memory is short")
@pytest.mark.parametrize("method", ["vicrop", "carve(steps=2)", "laser"])
@pytest.mark.parametrize("how", ["once", "always"])
def test_memory_short_in_a_reading_pass_does_not_slow_the_rest(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    watched = Watched(vlm, monkeypatch)
    calm, answered, most = watched.run(vlm, method)
    assert most == [5, 5, 5, 5], "four questions and a general one, or none"
    failures: list[int] = []

    def fails(rows: int) -> bool:
        failed = rows == 5 and (how == "always" or not failures)
        failures.extend([rows] * failed)
        return failed

    watched.fails = fails
    hungry, still_answered, still_most = watched.run(vlm, method)
    assert [r["answer"] for r in hungry] == [r["answer"] for r in calm]
    assert [r["notes"] for r in hungry] == [r["notes"] for r in calm]
    assert still_answered == answered, "as many at a time as without the shortage"
    if how == "once":
        assert failures == [5]
        assert still_most == [5, 2, 3, 5], "the readings halve, and grow back"
    else:
        assert failures == [5, 5], "not with every job"


def test_logits_that_are_no_numbers_are_an_error(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = vlm.model.get_output_embeddings().weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.nan))
    asker = Asker(vlm, ["vanilla"])
    found = list(asker.answer(asker.load(questions(Scenes())[0]), "vanilla"))
    assert len(found) == 4
    for record in found:
        assert "NaN" in record["error"]
        assert json.loads(json.dumps(record), parse_constant=no_constant) == record


# -- sharing ---------------------------------------------------------------------------------------


class Looking(Method, register=False):
    """Asks about the left or the right half, by the question, as methods that look again do."""

    name = "looking"

    def rewrite(self, vlm: Any, chats: list[Chat]) -> list[Chat]:
        halves: dict[bool, list[Image.Image]] = {}
        new = []
        for chat in chats:
            left, (width, height) = "c" in chat.text.split()[3], chat.images[0].size
            box = (0, 0, width // 2, height) if left else (width // 2, 0, width, height)
            halves.setdefault(left, [chat.images[0].crop(box)])
            new.append(Chat(halves[left], chat.text, chat.system, {"box": box}))
        return new


def test_methods_that_look_again_rewrite_first_and_then_group(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = questions(Scenes())[0]
    shared, alone = Asker(vlm, [Looking()]), Asker(vlm, [Looking()], share=False)
    groups: list[int] = []
    plain = answering.ask_together

    def counted(vlm: VLM, prompts: Any, *rest: Any) -> Any:
        groups.append(len(prompts.chats))
        return plain(vlm, prompts, *rest)

    monkeypatch.setattr(answering, "ask_together", counted)
    together = shared.answer(shared.load(unit), "looking")
    assert groups == [2, 2], "car and cat on the left, tree and house on the right"
    one_by_one = [r for q in unit for r in alone.answer(alone.load([q]), "looking")]
    assert [r["answer"] for r in together] == [r["answer"] for r in one_by_one]
    assert [r["notes"]["box"] for r in together] == [r["notes"]["box"] for r in one_by_one]
    assert [r["yes"] for r in together] == pytest.approx([r["yes"] for r in one_by_one], abs=1e-5)


def test_methods_that_cannot_share_are_asked_one_by_one(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clvs: Any = as_stack("clvs")[0]
    monkeypatch.setattr(type(clvs), "shares_prefix", False)
    sizes: list[int] = []
    plain = VLM.answer

    def counted(self: VLM, chats: list[Chat], *rest: Any, **options: Any) -> Any:
        sizes.append(len(chats))
        return plain(self, chats, *rest, **options)

    monkeypatch.setattr(VLM, "answer", counted)
    asker = Asker(vlm, ["clvs"])
    assert len(asker.answer(asker.load(questions(Scenes())[0]), "clvs")) == 4
    assert sizes == [1, 1, 1, 1]


def test_shards_have_whole_images_and_equal_parts() -> None:
    """A scene's words and its caption have different limits and stay together."""
    b = PocketBench(questions=60)
    parts = [questions(b, (number, 2)) for number in range(2)]
    images = [{q.sample.image_name for unit in part for q in unit} for part in parts]
    assert not images[0] & images[1]
    for category in ("existence-random", "captions"):
        counts = [
            sum(q.sample.meta["category"] == category for unit in part for q in unit)
            for part in parts
        ]
        assert sum(counts) == 120
        assert min(counts) > 40


@pytest.mark.long
def test_shards_put_together_are_the_whole(vlm: VLM, tmp_path: Path) -> None:
    b = Scenes(images=4)
    evaluate(Plan([b], ["vanilla", "clvs"], tmp_path / "whole"), vlm)
    for number in range(3):
        evaluate(Plan([b], ["vanilla", "clvs"], tmp_path / "parts", shard=(number, 3)), vlm)
    parts = merge(read_runs([tmp_path / "parts"]))
    whole = merge(read_runs([tmp_path / "whole"]))
    assert parts.keys() == whole.keys()
    for name, rows in whole[str(b)].items():
        assert {k: r["answer"] for k, r in parts[str(b)][name].items()} == {
            k: r["answer"] for k, r in rows.items()
        }
    assert read_run(tmp_path / "parts" / "shard-1-of-3")["shard"] == [1, 3]
    for options in ({"seed": 1, "shard": (1, 3)}, {"shard": (1, 2)}, {}):
        with pytest.raises(FoveateError, match="begun with other settings"):
            evaluate(Plan([b], ["vanilla", "clvs"], tmp_path / "parts", **options), vlm)


def test_jobs_are_the_same_whatever_is_there(tmp_path: Path) -> None:
    source = {"model": "m", "revision": None, "commit": None}

    def begin(name: str, **options: Any) -> Run:
        plan = Plan([Scenes(images=5)], ["vanilla"], tmp_path / name, **options)
        return Run(plan, source, "float32")

    with begin("alone", share=False) as run:
        assert [len(job) for job in run.jobs(2)] == [1] * 25
    with begin("a") as run:
        jobs = run.jobs(2)
        assert [len(job) for job in jobs] == [4, 2, 4, 4, 2, 4, 4, 1]
        assert all(len({q.limit for q in job}) == 1 for job in jobs)
        done = jobs[1][0]
        run.keep([record(done, "vanilla")])
        assert run.jobs(2) == jobs, "half a job is asked as a whole"
        run.keep([record(question, "vanilla") for question in jobs[1]])
        assert run.jobs(2) == [jobs[0], *jobs[2:]]
    assert count(tmp_path / "a") == 2
    with begin("b", limit=2) as run:
        assert [(q.sample.split, q.sample.line) for unit in run.units for q in unit] == [
            ("short", 0), ("short", 1), ("captions", 0), ("captions", 1)
        ]  # fmt: skip


def record(question: Question, method: str) -> EvalRecord:
    return evaluation.as_record(question, method, "nothing", 0.0)


def test_the_next_images_are_opened_beside_the_model() -> None:
    opened: list[tuple[int, bool]] = []
    third = threading.Event()

    def load(job: int) -> int:
        opened.append((job, threading.current_thread() is threading.main_thread()))
        if job == 2:
            third.set()
        return job

    ahead = evaluation._ahead([0, 1, 2, 3, 4], load)
    assert next(ahead) == 0
    assert third.wait(10), "two more are on their way while the first is answered"
    assert not any(main for _, main in opened)
    assert list(ahead) == [1, 2, 3, 4]
    assert [job for job, _ in opened] == [0, 1, 2, 3, 4]


# -- the command -----------------------------------------------------------------------------------


BENCH = "pocket(questions=2, categories=('existence-random', 'attribute'))"


@pytest.mark.long
def test_eval_on_drawn_scenes(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.common.Progress, "EVERY", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    code, printed, told = run("eval", BENCH, "--out", out, "--device", "cpu")
    assert code == 0
    assert "16 of 16 questions" in told
    assert "Existence, random" in printed
    assert re.search(r"┃ vanilla\s*┃ clvs\s*┃", printed), "side by side"
    assert f"results: {out / RESULTS}" in printed
    results = json.loads((out / RESULTS).read_text())
    entry = results["benchmarks"][str(parse(BENCH)[0])]["methods"]["clvs"]
    assert entry["questions"] == 8
    assert entry["scores"]["attribute/with/accuracy"] >= 50
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = tmp_path / "parts"
    assert run("eval", BENCH, "--out", parts, "--method", "vanilla", "--limit", 1)[0] == 0
    assert (parts / "shard-1-of-2" / RESULTS).exists()


@pytest.mark.long
def test_eval_stopped_by_hand(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    given = ("eval", BENCH, "--out", tmp_path, "--method", "vanilla", "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(commands.common.Progress, "__call__", stop)
        code, _, told = run(*given)
    assert code == 130
    assert told == "foveate: stopped; the same command goes on from here\n"
    assert count(tmp_path) == 3
    assert run(*given)[0] == 0
    assert count(tmp_path) == 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["pope(sorce=gqa)"], "did you mean 'source'"),
        (["pocket", "--shard", "2"], "Cannot read the shard '2'"),
        (["pocket", "--shard", "2/2"], "no shard 2/2"),
        (["pocket", "--batch-size", "many"], "Cannot read the batch size 'many'"),
        (["pocket", "--method", "clsv"], "did you mean 'clvs'"),
        (["pope", "--data-root", "nowhere"], "The data root nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Any, tmp_path: Path, given: list[str], sentence: str
) -> None:
    code, _, told = run("eval", *given, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2
    assert sentence in told
    assert told.startswith("foveate: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
