"""`foveate ask`: one question about an image, with every method given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    SIDE_BY_SIDE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PluginOption,
    RevisionOption,
    draw,
    hint,
    load,
    load_plugins,
    new_table,
    note_unknown_words,
    print_table,
    read_picture,
    rounded,
    serves,
)

if TYPE_CHECKING:
    from ..vlm.chat import Answer


@app.command()
def ask(
    image: Annotated[
        str, typer.Argument(help="Give a picture's path, or `demo` for a drawn scene.")
    ],
    question: Annotated[str, typer.Argument(help="Ask this about the picture.")],
    model: ModelOption = "pocket",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer with vanilla, clvs, clvs(smoothing=0.7), clvs+vcd, ... Repeat it to "
            "compare methods, or give all. The default compares vanilla and clvs."
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Draw the attention of each layer into this picture. For methods that look "
            "again, draw the steps from the picture to the one they asked about."
        ),
    ] = None,
    as_json: JsonOption = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Stop an answer after this many tokens.")
    ] = 64,
    system: Annotated[str | None, typer.Option(help="Put this system prompt first.")] = None,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask one question about an image, with every method given, and compare the answers.

    Seconds are measured after one token has been produced to warm up.
    """
    from ..core.method import as_stack, methods, text

    load_plugins(plugin)
    if not question.strip():
        raise FoveateError("The question is empty: ask something about the image.")
    if show:
        from ..insight.plots.style import check_path

        check_path(show)
    picture = read_picture(image)
    chosen = method or list(SIDE_BY_SIDE)
    chosen = ["all" if m.lower() == "all" else m for m in chosen]
    stacks = [as_stack(m) for m in chosen if m != "all"]
    vlm = load(model, revision=revision, device=device, dtype=dtype)
    if vlm.name == "pocket":
        note_unknown_words(vlm, question)
    if "all" in chosen:
        known = [(), *((cls(),) for cls in methods().values())]
        stacks += [stack for stack in known if stack not in stacks and serves(vlm.model, stack)]
    vlm.ask(picture, question, system=system, max_new_tokens=1)
    answers = [
        vlm.ask(
            picture,
            question,
            stack,
            system=system,
            max_new_tokens=max_new_tokens,
            record=show is not None,
        )
        for stack in stacks
    ]
    names = [text(stack) for stack in stacks]
    if as_json:
        rows = [_as_dict(name, answer) for name, answer in zip(names, answers, strict=True)]
        print(json.dumps({**vlm.source, "image": image, "question": question, "answers": rows}))
    else:
        table = new_table("method", "answer", "probability", "seconds")
        table.caption_justify = "left"
        table.caption = (
            "Probability is of the answer: of a yes or no, against the other; of other answers, "
            "the geometric mean over tokens."
        )
        for name, answer in zip(names, answers, strict=True):
            table.add_row(name, answer.text, rounded(answer.probability), f"{answer.seconds:.2f}")
        print_table(table)
    if show:
        drawn = dict(zip(names, answers, strict=True))
        if () not in stacks and any("chain" in answer.chat.notes for answer in answers):
            drawn["vanilla"] = vlm.ask(
                picture, question, system=system, max_new_tokens=max_new_tokens
            )
        draw(vlm, question, drawn, show)
        if not as_json:
            print(f"picture: {show}")
    elif not as_json:
        hint("--show FILE.png draws where the model looks; foveate trace shows it by token")


def _as_dict(name: str, answer: Answer) -> dict[str, Any]:
    kept = ("probability", "yes", "tokens", "probabilities", "seconds", "timings")
    return {"method": name, "answer": answer.text} | {key: getattr(answer, key) for key in kept}
