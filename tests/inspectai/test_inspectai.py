"""The real inspect-ai runs tasks of a drawn scene with foveate; `make test-inspect`, no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("inspect_ai", reason="inspect-ai has an environment of its own")

from inspect_ai import Task
from inspect_ai import eval as run_tasks
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelOutput,
    get_model,
)
from inspect_ai.scorer import match
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo
from PIL import Image

from foveate import VLM, FoveateError
from foveate.base.images import decode_all
from foveate.bridges.inspect_provider import Foveate
from foveate.scenes import questions, world
from foveate.vlm.chat import Turn

METHOD = "clvs(smoothing=0.9,top_k=5)"
ASKED = (
    ("Is there a car in the image?", "yes"),
    ("What letter is on the car?", "e"),
    ("Describe this image.", "there"),
)
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def drawn():
    def sample(question, target):
        content = [ContentImage(image={picture!r}), ContentText(text=question)]
        return Sample(input=[ChatMessageUser(content=content)], target=target)

    samples = [sample(*one) for one in {asked!r}]
    return Task(dataset=samples, solver=generate(), scorer=match(location="begin"))
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    world.draw(world.sample(questions.FIRST_HELD_OUT)).save(path)
    return path


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def provider() -> Foveate:
    found = get_model("foveate/pocket", device="cpu").api
    assert isinstance(found, Foveate)
    return found


def user(picture: Path | None, text: str) -> ChatMessageUser:
    shown = [] if picture is None else [ContentImage(image=str(picture))]
    return ChatMessageUser(content=[*shown, ContentText(text=text)])


def ask(provider: Foveate, *messages: ChatMessage, **config: Any) -> ModelOutput:
    given = list(messages), [], "none", GenerateConfig(**config)
    return anyio.run(provider.generate, *given)


def evaluated(picture: Path, log: Path, method: str, **options: Any) -> EvalLog:
    samples = [Sample(input=[user(picture, text)], target=target) for text, target in ASKED]
    task = Task(dataset=samples, solver=generate(), scorer=match(location="begin"))
    model = get_model("foveate/pocket", device="cpu", method=method)
    (found,) = run_tasks(task, model=model, log_dir=str(log), display="none", **options)
    assert found.status == "success", found.error
    return found


def answers(log: EvalLog) -> list[str]:
    return [sample.output.completion for sample in log.samples or ()]


def test_every_start_of_inspect_loads_neither_torch_nor_a_model() -> None:
    code = (
        "import sys, importlib.metadata as m\n"
        "(point,) = [p for p in m.entry_points(group='inspect_ai') if p.name == 'foveate']\n"
        "point.load()\n"
        "print(sorted({'torch', 'transformers', 'foveate.vlm.vlm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_runs_a_task_with_a_method(
    picture: Path, vlm: VLM, tmp_path: Path
) -> None:
    (tmp_path / "drawn.py").write_text(TASK.format(picture=str(picture), asked=ASKED), "utf-8")
    command = [sys.executable, "-m", "inspect_ai", "eval", "drawn.py", "--model", "foveate/pocket"]
    command += ["-M", f"method={METHOD}", "-M", "device=cpu", "--max-tokens", "8"]
    done = subprocess.run(
        [*command, "--display", "plain", "--log-dir", "log"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "log").glob("*.eval")
    log = read_eval_log(str(path))
    expected = [vlm.ask(picture, text, METHOD, max_new_tokens=8).text for text, _ in ASKED]
    assert answers(log) == expected
    assert all(s.output.metadata == {"method": "clvs(smoothing=0.9, top_k=5)"} for s in log.samples)


def test_an_unknown_method_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(TASK.format(picture="", asked=ASKED), "utf-8")
    command = [sys.executable, "-m", "inspect_ai", "eval", "drawn.py", "--model", "foveate/pocket"]
    done = subprocess.run(
        [*command, "-M", "method=clvz", "--display", "plain"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    told = (done.stdout + done.stderr).strip()
    assert told == "There is no method 'clvz' (did you mean 'clvs'?)."


@pytest.mark.parametrize("method", ["vanilla", "laser"])
def test_answers_are_those_of_foveate_and_the_method_acts(
    picture: Path, vlm: VLM, tmp_path: Path, method: str
) -> None:
    log = evaluated(picture, tmp_path, method, max_tokens=8)
    expected = [vlm.ask(picture, text, method, max_new_tokens=8).text for text, _ in ASKED]
    assert answers(log) == expected
    assert (expected[1] == "e") == (method == "laser")
    right = [answer.startswith(target) for answer, (_, target) in zip(expected, ASKED, strict=True)]
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(right) / 3)


def test_samples_that_wait_share_a_batch_and_keep_their_settings(
    picture: Path, provider: Foveate
) -> None:
    outputs: dict[int, str] = {}
    alone = ask(provider, user(picture, "Describe this image."), max_tokens=6).completion

    async def one(limit: int, temperature: float) -> None:
        config = GenerateConfig(max_tokens=limit, temperature=temperature, seed=0)
        message = user(picture, "Describe this image.")
        outputs[limit] = (await provider.generate([message], [], "none", config)).completion

    async def several() -> None:
        async with anyio.create_task_group() as group:
            for limit in range(1, 9):
                group.start_soon(one, limit, 5.0 if limit == 8 else 0.0)

    def total() -> float:
        assert provider.worker is not None
        registry = provider.worker.metrics.registry
        return registry.get_sample_value("foveate_batch_size_count") or 0.0

    before = total()
    anyio.run(several)
    assert total() - before < 8
    assert outputs[6] == alone
    assert [len(outputs[limit].split()) for limit in range(1, 5)] == [1, 2, 3, 4]
    assert not outputs[8].startswith(alone)


def test_length_stop_sequences_temperature_and_usage(picture: Path, provider: Foveate) -> None:
    asked = user(picture, "Describe this image.")
    long = ask(provider, asked, max_tokens=12)
    words = long.completion.split()
    assert long.stop_reason == "max_tokens"
    assert long.usage is not None
    assert long.usage.output_tokens == 12
    cut = ask(provider, asked, max_tokens=12, stop_seqs=[words[3]])
    assert cut.completion.split() == words[:3]
    assert cut.stop_reason == "stop"
    drawn = [ask(provider, asked, max_tokens=8, temperature=3.0, seed=n) for n in (0, 0, 1)]
    assert drawn[0].completion == drawn[1].completion != drawn[2].completion
    assert ask(provider, asked, max_tokens=8, top_p=0.9, seed=0).completion


def test_turns_and_pictures_as_data(picture: Path, provider: Foveate, vlm: VLM) -> None:
    from inspect_ai._util.images import file_as_data_uri

    data = anyio.run(file_as_data_uri, str(picture))
    first = ChatMessageUser(content=[ContentText(text="Is there a car?"), ContentImage(image=data)])
    second = user(None, "What color is it?")
    said = ask(provider, first, ChatMessageAssistant(content="yes"), second, max_tokens=4)
    earlier = [Turn("user", "Is there a car?", images=1), Turn("assistant", "yes")]
    chat = vlm.chat(decode_all(Image.open(picture)), "What color is it?", None, earlier)
    (expected,) = vlm.answer([chat], (), 4)
    assert said.completion == expected.text


def test_what_cannot_be_answered_is_refused(picture: Path, provider: Foveate) -> None:
    asked = user(picture, "Is there a car?")
    with pytest.raises(FoveateError, match="does not have logprobs"):
        ask(provider, asked, logprobs=True)
    with pytest.raises(FoveateError, match="one answer per sample"):
        ask(provider, asked, num_choices=2)
    with pytest.raises(FoveateError, match="another order"):
        ask(provider, ChatMessageAssistant(content="yes"), asked)
    with pytest.raises(FoveateError, match="another order"):
        ask(provider, asked, ChatMessageSystem(content="Be brief."))
    sound = ChatMessageUser(content=[ContentAudio(audio="a.wav", format="wav")])
    with pytest.raises(FoveateError, match="no audio"):
        ask(provider, sound)
    with pytest.raises(FoveateError, match=r"Cannot read the picture nowhere\.png"):
        ask(provider, user(Path("nowhere.png"), "Is there a car?"))
    tool = ToolInfo(name="look", description="Look.")
    with pytest.raises(FoveateError, match="calls no tools"):
        anyio.run(provider.generate, [asked], [tool], "auto", GenerateConfig())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"methods": "clvs"}, "has no argument 'methods'"),
        ({"method": ["clvs(smoothin=0.7", "top_k=5)"]}, "did you mean 'smoothing'"),
        ({"method": "clvs(layers=(1,99))"}, "99"),
        ({"base_url": "http://localhost"}, "leave out the base URL"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(arguments: Any, sentence: str) -> None:
    with pytest.raises(PrerequisiteError) as told:
        get_model("foveate/pocket", device="cpu", memoize=False, **arguments)
    assert sentence in str(told.value.message)


def test_a_model_that_is_not_there_is_told_in_a_sentence() -> None:
    with pytest.raises(PrerequisiteError) as told:
        get_model("foveate//no/such/folder", memoize=False)
    assert "/no/such/folder" in str(told.value.message)


def test_asking_for_a_model_s_name_loads_no_weights() -> None:
    from inspect_ai.model._model_info import MODEL_INFO_LOOKUP_API_KEY

    found = get_model("foveate/pocket", api_key=MODEL_INFO_LOOKUP_API_KEY, memoize=False).api
    assert not hasattr(found, "vlm")
    found.close()
