"""`foveate heads`: which heads adhh should cut."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    Progress,
    RevisionOption,
    hint,
    load,
    new_table,
    print_table,
)


@app.command()
def heads(
    model: Annotated[
        str, typer.Argument(help="Give pocket, a saved model's folder, or a hub name.")
    ] = "pocket",
    images: Annotated[
        Path | None,
        typer.Option(help="Describe the images of this folder; the pocket model draws its own."),
    ] = None,
    objects: Annotated[
        Path | None,
        typer.Option(
            help='Read what they show: lines of {"image": "a.jpg", "objects": ["cup", "dog"]}.'
        ),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(
            help="Read words from lines of `category, synonym, ...`; default: those in --objects."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "--scenes",
            min=1,
            help="Use so many images (default: all), or draw so many scenes (default: 400).",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="List so many heads; default: 20, but at most a tenth of all."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write this folder; default: heads-MODEL.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this; default: Please describe this image in detail.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="End captions after so many tokens.")
    ] = 128,
    rows: Annotated[
        int,
        typer.Option(
            min=1, help="Run so many heads times tokens per forward; more need more memory."
        ),
    ] = 256,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find the heads that favour words for things that are not there: the list for adhh.

    The model describes every image; at each word for an object every head is removed in turn.
    You can stop it at any time: the same command goes on, from the .jsonl file beside --out.
    """
    from ..insight.heads import PROMPT, counted, find_heads, folder_samples, pocket_samples

    if images and objects:
        samples, vocabulary = folder_samples(images, objects, synonyms)
        samples = samples[:limit]
    elif images or objects or synonyms or model != "pocket":
        raise FoveateError(
            "Say what to describe and what it shows with --images FOLDER --objects FILE.jsonl: the "
            "published lists come from 3000 images of COCO train2014 and the classes of their "
            "instances."
        )
    else:
        samples, vocabulary = pocket_samples(limit or 400)
    path = out or Path(f"heads-{Path(model).resolve().name}")
    given = {"images": images, "objects": objects, "synonyms": synonyms, "limit": limit,
             "top-k": top_k, "prompt": prompt, "max-new-tokens": max_new_tokens,
             "dtype": dtype, "revision": revision}  # fmt: skip
    command = ["foveate", "heads", model]
    command += [str(x) for k, v in given.items() if v is not None for x in (f"--{k}", v)]
    vlm = load(model, revision=revision, device=device, dtype=dtype)
    with Progress("captions") as watch:
        found = find_heads(
            vlm,
            samples,
            vocabulary,
            path,
            prompt=prompt or PROMPT,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            rows=rows,
            command=shlex.join(command),
            watch=watch,
        )
    scores = found.tensors["scores"]
    ranked = [(at, head, float(scores[at, head])) for at, head in found.tensors["heads"].tolist()]
    if as_json:
        entries = [dict(zip(("layer", "head", "score"), one, strict=True)) for one in ranked]
        print(json.dumps({"heads": entries, "made": found.made, "folder": str(path)}))
        return
    table = new_table("layer", "head", "score")
    for layer, head, score in ranked:
        table.add_row(str(layer), str(head), f"{score:+.4f}")
    print_table(table)
    print(f"{found.made['images']} captions: {counted(found.made)}")
    print(f"heads: {path}")
    hint(
        f"foveate eval BENCHMARK --model {model} --method vanilla --method \"adhh(heads='{path}')\""
    )
