"""Models of the hub in a revision: which one is loaded, and that every result says so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError

from foveate import VLM, FoveateError
from foveate.base.journal import Journal
from foveate.commands import main
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.run import RESULTS, RUN
from foveate.insight import heads
from foveate.insight.trace import trace
from foveate.scenes import world
from foveate.scenes.export import export
from foveate.training.injection import tune
from foveate.training.recipe import Recipe
from foveate.vlm import loading
from tests.test_evaluation import Scenes, drawn

NAME = "somebody/small"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
ABSENT = ("adapter_config.json",)  # which the hub was found not to have
ASKED = {"model": NAME, "revision": "v1", "commit": OLD}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub with a model in two commits, the older one tagged v1."""
    cache = tmp_path_factory.mktemp("cache")
    home = cache / "models--somebody--small"
    vlm = VLM.load("pocket", device="cpu")
    for number, commit in enumerate((OLD, NEW)):
        with torch.no_grad():
            vlm.model.lm_head.weight.mul_(1 + number)
        vlm.model.save_pretrained(home / "snapshots" / commit)
        vlm.processor.save_pretrained(home / "snapshots" / commit)
        (home / ".no_exist" / commit).mkdir(parents=True)
        for absent in ABSENT:
            (home / ".no_exist" / commit / absent).touch()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(NEW)
    (home / "refs" / "v1").write_text(OLD)
    return cache


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The network is away, the cache is there; notes the revisions that the hub was asked for."""
    asked: list[Any] = []

    def info(self: Any, name: str, *, revision: str | None = None, **rest: Any) -> None:
        asked.append(revision)
        raise OSError("no network")

    monkeypatch.setattr(loading.HfApi, "model_info", info)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    original = loading.try_to_load_from_cache  # has the cache's place as a default
    monkeypatch.setattr(
        loading,
        "try_to_load_from_cache",
        lambda *args, **options: original(*args, cache_dir=str(cache), **options),
    )
    return asked


def load(revision: str | None = "v1") -> VLM:
    return VLM.load(NAME, device="cpu", revision=revision)


@pytest.mark.parametrize(
    ("revision", "commit"), [("v1", OLD), (OLD, OLD), ("main", NEW), (None, NEW)]
)
def test_a_revision_is_loaded_and_its_commit_known(
    hub: list[Any], revision: str | None, commit: str
) -> None:
    vlm = load(revision)
    assert hub == [revision]
    assert (vlm.revision, vlm.commit) == (revision, commit)
    assert loading.outline(NAME, revision).config.model_type == vlm.model.config.model_type
    weight = VLM.load("pocket", device="cpu").model.lm_head.weight
    assert torch.equal(vlm.model.lm_head.weight, weight * (1 if commit == OLD else 2))


def test_what_has_no_revision_is_refused_in_one_sentence(
    hub: list[Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "models--somebody--small" / "snapshots" / OLD
    for name in ("pocket", str(folder)):
        with pytest.raises(FoveateError, match="not come from the hub, so it has no revision 'v1'"):
            VLM.load(name, revision="v1")
    with pytest.raises(FoveateError, match="in the revision 'v2' is not in the local cache"):
        load("v2")

    def unknown(*_: Any, **__: Any) -> None:
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(loading.HfApi, "model_info", unknown)
    with pytest.raises(FoveateError, match=f"hub's {NAME} has no revision 'v3': give a branch"):
        load("v3")


def test_models_from_elsewhere_have_no_commit(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(cache / "models--somebody--small" / "snapshots" / OLD, tmp_path / "copy")
    for name in ("pocket", str(tmp_path / "copy")):
        assert VLM.load(name, device="cpu").source == {
            "model": name,
            "revision": None,
            "commit": None,
        }


def test_a_run_says_which_revision_and_goes_on_with_no_other(
    hub: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b, out = Scenes(images=1, captions=False), tmp_path / "run"
    evaluate(Plan([b], ["vanilla"], out), load())
    begun = json.loads((out / RUN).read_text())
    ended = json.loads((out / RESULTS).read_text())["run"]
    assert all({name: file[name] for name in ASKED} == ASKED for file in (begun, ended))
    evaluate(Plan([b], ["vanilla"], out), load())
    moved = load("v1")
    moved.commit = NEW
    with pytest.raises(FoveateError, match=rf"other settings \(commit: '{OLD}', now '{NEW}'"):
        evaluate(Plan([b], ["vanilla"], out), moved)
    with pytest.raises(FoveateError, match=r"other settings \(revision: 'v1', now None"):
        evaluate(Plan([b], ["vanilla"], out), load(None))


def test_what_was_begun_before_revisions_were_noted_goes_on(tmp_path: Path) -> None:
    b, vlm = Scenes(images=1, captions=False), VLM.load("pocket", device="cpu")
    evaluate(Plan([b], ["vanilla"], tmp_path), vlm)
    begun = json.loads((tmp_path / RUN).read_text())
    (tmp_path / RUN).write_text(
        json.dumps({k: v for k, v in begun.items() if k not in ("revision", "commit")})
    )
    evaluate(Plan([b], ["vanilla"], tmp_path), vlm)
    Journal(tmp_path / "rows", lambda row: row["n"], {"model": "pocket"}).close()
    Journal(tmp_path / "rows", lambda row: row["n"], vlm.source).close()
    with pytest.raises(FoveateError, match=r"other settings \(commit: None, now 'c'\)"):
        Journal(tmp_path / "rows", lambda row: row["n"], vlm.source | {"commit": "c"})


def test_a_trace_says_which_revision(hub: list[Any]) -> None:
    traced = trace(load(), drawn(1), "Is there a car?", ["vanilla"], max_new_tokens=1)
    assert {name: traced.to_json()[name] for name in ASKED} == ASKED


def test_a_list_of_heads_says_which_revision(hub: list[Any], tmp_path: Path) -> None:
    samples, words = heads.pocket_samples(2)
    there = frozenset(world.KINDS), frozenset[str]()  # all that is said of the first, or nothing
    samples = [dataclasses.replace(s, objects=o) for s, o in zip(samples, there, strict=True)]
    out = tmp_path / "heads"
    found = heads.find_heads(load(), samples, words, out, max_new_tokens=8, command="again")
    assert [found.made[name] for name in ("name", "revision", "commit")] == list(ASKED.values())
    begun = json.loads(heads.records_beside(out).read_text().splitlines()[0])["settings"]
    assert {name: begun[name] for name in ASKED} == ASKED


def test_a_training_says_which_revision_and_ends_on_it(hub: list[Any], tmp_path: Path) -> None:
    export(1, tmp_path / "data", size=96)
    data, recipe = tmp_path / "data" / "conversations.jsonl", Recipe("vanilla", "full", steps=1)
    recipe = dataclasses.replace(recipe, batch_size=1, max_length=512)
    tune(NAME, data, tmp_path / "run", recipe, revision="v1")
    assert hub == ["v1", OLD], "the base that is saved is of the commit that was trained"
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in ASKED} == ASKED
    with pytest.raises(FoveateError, match=r"other settings \(revision: 'v1', now None"):
        tune(NAME, data, tmp_path / "run", recipe)


@pytest.fixture
def run(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """A command in a folder of its own; its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def running(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--revision", "v1"])
        return end.value.code

    return running


def has(file: str) -> None:
    found = json.loads(Path(file).read_text())
    found = found.get("run", found.get("settings", found))
    assert {name: found[name] for name in ASKED} == ASKED


@pytest.mark.long
def test_every_command_that_asks_a_model_takes_a_revision(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["demo", "Is there a car?", "--model", NAME, "--method", "vanilla"]
    assert run("ask", *one, "--json") == 0
    assert json.loads(capsys.readouterr().out).items() >= ASKED.items()
    assert run("trace", *one, "--out", "traced", "--max-new-tokens", "1") == 0
    has("traced/trace.json")
    bench = "pocket(categories=('number',), questions=2)"
    assert run("eval", bench, "--model", NAME, "--method", "vanilla", "--out", "run") == 0
    has("run/results.json")
    assert run("sweep", "vaf", "--over", "enhance=1.1,1.2", "--bench", bench, "--model", NAME,
               "--out", "swept") == 0  # fmt: skip
    has("swept/sweep.json")
    assert run("analyze", "layers", "--model", NAME, "--limit", "2") == 0
    has("layers.json")
    assert "--revision v1" in Path("layers.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["report", "run", "--out", "told"])
    assert f"revision v1, commit {OLD}" in Path("told/report.md").read_text()


def test_commands_refuse_a_revision_of_what_is_not_on_the_hub(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["ask", "demo", "Is there a car?"],
        ["methods", "--model", "pocket"],
        ["heads", "pocket", "--limit", "1"],
        ["serve", "--port", "0"],
    ):
        assert run(*command) == 2
        assert "no revision 'v1': leave out the revision." in capsys.readouterr().err
    assert run("methods") == 2
    assert "add --model" in capsys.readouterr().err
