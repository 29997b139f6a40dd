"""The directions that VTI steers along: from hallucinated captions to true ones, from patches away.

    find_directions(vlm, demonstrations, out, ...) -> Artifact       # `foveate directions MODEL`
    pocket_demonstrations(count)      read_demonstrations(file, images=None)

Published (VTI, arXiv 2410.15778): a demonstration is an image, a question, a true caption and a
hallucinated one. Text: the states of the last row after the true caption less those after the
hallucinated one, over all layers. Image: the mean state of the vision tower over views of which
nearly all patches are masked, less that of the whole image, over all blocks and tokens. The
direction is the mean of these differences plus their first principal component.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backends.transformers import compat_parts
from ..backends.transformers.anatomy import anatomy
from ..base.artifact import DIRECTIONS, Artifact
from ..base.errors import FoveateError
from ..base.images import decode
from ..base.journal import Journal
from ..scenes import questions, world
from ..vlm.chat import Chat
from ..vlm.vlm import VLM
from .heads import FIRST_SCENE, records_beside
from .reading import read_all

MASKED = 0.99  # share of the patches
Grouping = Literal["released", "token"]

_VIEWS = 10  # masked views per pass of the tower
_GROUPS = 64  # groups of image states whose components are found together


@dataclass(frozen=True)
class Demonstration:
    """An image, a question, a true caption and a hallucinated one; `load` raises `FoveateError`."""

    name: str
    question: str
    true: str
    hallucinated: str
    load: Callable[[], Image.Image]


def pocket_demonstrations(count: int) -> list[Demonstration]:
    """Drawn scenes; the hallucinated caption has a thing that goes with the others in its place."""
    found: list[Demonstration] = []
    seed = FIRST_SCENE
    while len(found) < count:
        scene, seed = world.sample(seed, ("with", "against")[seed % 2]), seed + 1
        view, rng = questions.look(scene), random.Random(scene.seed)
        single = view.single()
        if not single:
            continue
        replaced, kind = rng.choice(single), rng.choice(questions.ranked(view, "adversarial"))
        things = list(scene.things)
        things[replaced] = dataclasses.replace(things[replaced], kind=kind)
        other = questions.look(dataclasses.replace(scene, things=tuple(things)))
        true = questions.caption(view, random.Random(scene.seed))
        false = questions.caption(other, random.Random(scene.seed))
        if true is None or false is None or true.answer == false.answer:
            continue
        name = f"{scene.habit}-{scene.seed}"
        load = functools.partial(world.draw, scene)
        found.append(Demonstration(name, true.text, true.answer, false.answer, load))
    return found


def read_demonstrations(file: Path, images: Path | None = None) -> list[Demonstration]:
    """Demonstrations from lines of JSON, as the authors of VTI write them.

    A line is ``{"image": "a.jpg", "question": ..., "value": true caption, "h_value": hallucinated
    one}``. Others are left out with a warning.

    Args:
        images: folder of the pictures; default: the file's.
    """
    folder = images or file.parent
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FoveateError(
            f"The demonstrations {file} cannot be read: {error.strerror}."
        ) from error
    found, broken = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            given = [row[key] for key in ("image", "question", "value", "h_value")]
            if not all(isinstance(text, str) and text.strip() for text in given):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            broken.append(number)
            continue
        name, question, true, hallucinated = given
        load = functools.partial(decode, folder / name)
        found.append(Demonstration(f"{number}: {name}", question, true, hallucinated, load))
    form = '{"image": "a.jpg", "question": ..., "value": ..., "h_value": ...}'
    if not found:
        raise FoveateError(f"{file} has no usable line: write one per demonstration, as {form}.")
    if broken:
        warnings.warn(
            f"{len(broken)} of {len(lines)} lines of {file} are not of the form {form} and were "
            f"left out; the first is line {broken[0]}.",
            stacklevel=2,
        )
    return found


# -- the search


def find_directions(
    vlm: VLM,
    demonstrations: Sequence[Demonstration],
    out: Path,
    *,
    grouping: Grouping = "released",
    trials: int = 50,
    image: bool = True,
    seed: int = 0,
    command: str = "",
    watch: Callable[[int, int, str], None] | None = None,
) -> Artifact:
    """Find a model's directions, and write them to the folder `out` for VTI.

    The states of each demonstration go to a folder beside it with the ending .states, at once, and
    nothing is computed twice: the same call goes on where an interrupted one stopped. That folder
    needs 4 bytes per state (60 MB a demonstration for the tower of LLaVA-1.5) and is deleted at
    the end.

    Args:
        grouping: which image states share a principal component: "token", those of one token in
            all blocks, as the paper says; or "released", as in the authors' code, which cuts the
            (block, token) states in their order into as many groups as there are tokens.
        trials: masked views of an image. image: make image directions, too, where the tower can
            be read. seed: of the masks.
        watch: is told after every demonstration how many are done, of how many.

    Returns:
        The artifact: "text" (L, D), "image" (L_v, T_v, D_v) where it was made, float32.

    Raises:
        FoveateError: fewer than two demonstrations could be used, the records are of other
            settings, or a file cannot be written.
    """
    if trials < 1 or grouping not in ("released", "token"):
        raise FoveateError("trials must be at least 1, and grouping 'released' or 'token'.")
    image = image and anatomy(vlm.model).plain_tower is not None
    settings = {
        **vlm.source,
        "shape": anatomy(vlm.model).shape,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "grouping": grouping,
        "trials": trials if image else None,
        "seed": seed,
    }
    records = records_beside(out)
    states = out.with_name(f"{out.name}.states")
    states.mkdir(parents=True, exist_ok=True)
    journal = Journal(records, lambda row: row["demonstration"], settings)

    def measure(one: Demonstration) -> dict[str, Any]:
        tensors = {"text": text_difference(vlm, one)}
        if image:
            difference = image_difference(vlm, one, trials, seed)
            tensors["image"] = grouped(difference, grouping)
        file = f"{_digest(one)}.safetensors"
        part = states / f"{file}.part"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        part.replace(states / file)
        return {"demonstration": one.name, "file": file}

    rows = read_all(
        journal,
        {one.name: one for one in demonstrations},
        measure,
        current=lambda one, row: (
            row["file"] == f"{_digest(one)}.safetensors" and (states / row["file"]).is_file()
        ),
        watch=(lambda done, total, row: watch(done, total, "captions compared")) if watch else None,
    )
    if len(rows) < 2:
        raise FoveateError("One demonstration has no principal component: give at least two.")
    files = [states / row["file"] for row in rows]
    found = {"text": text_direction(files)}
    if image:
        found["image"] = image_direction(files, grouping)
    made = {
        **{name: settings[name] for name in ("revision", "commit", "grouping", "trials", "seed")},
        "name": settings["model"],
        "demonstrations": len(rows),
        "command": command,
    }
    artifact = Artifact(DIRECTIONS, anatomy(vlm.model).shape, found, made=made)
    artifact.save_pretrained(out)
    shutil.rmtree(states)
    records.unlink()
    return artifact


@torch.inference_mode()
def text_difference(vlm: VLM, one: Demonstration) -> Tensor:
    """What enters each layer and leaves the final norm, (L + 1, D) float32: true - hallucinated."""
    chat = Chat([one.load()], one.question)
    states = []
    for caption in (one.true, one.hallucinated):
        inputs = captioned(vlm, chat, caption)
        out = vlm.model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        if out.hidden_states is None:
            raise FoveateError(f"{type(vlm.model).__name__} hands out no hidden states.")
        states.append(torch.stack([h[0, -1].float().cpu() for h in out.hidden_states]))
    return states[0] - states[1]


def captioned(vlm: VLM, chat: Chat, caption: str) -> dict[str, Any]:
    """Model inputs of a prompt with an answer right behind it, without a space or an end token."""
    prompt, inputs = vlm.prompt(chat), dict(vlm.inputs([chat]))
    bos = vlm.tokenizer.bos_token
    special = not (bos and prompt.startswith(bos))
    with vlm.tokenizing:
        texts = vlm.tokenizer([prompt, prompt + caption], add_special_tokens=special)
    before, whole = texts["input_ids"]
    same = 0  # the caption's first letters may change how the prompt's last ones are cut
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    ids = inputs["input_ids"]
    kept = ids.shape[1] - (len(before) - same)
    added = torch.tensor([whole[same:]], device=ids.device, dtype=ids.dtype)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "input_ids":
            one = int(name == "attention_mask")
            inputs[name] = torch.cat([value[:, :kept], torch.full_like(added, one)], 1)
    return inputs | {"input_ids": torch.cat([ids[:, :kept], added], 1)}


@torch.inference_mode()
def image_difference(vlm: VLM, one: Demonstration, trials: int, seed: int) -> Tensor:
    """States of the tower, (L_v + 1, T_v, D_v) float32: mean over masked views - the image's.

    The first are those that enter the first block. Of a picture in tiles the first tile counts.
    """
    inputs = vlm.inputs([Chat([one.load()], one.question)])
    pixels = inputs["pixel_values"].flatten(0, -4)[:1]
    side = vlm.model.config.vision_config.patch_size
    side = side if isinstance(side, int) else side[0]
    generator = torch.Generator().manual_seed(seed + int(_digest(one)[:8], 16))
    total: Tensor | None = None
    for start in range(0, trials, _VIEWS):
        count = min(_VIEWS, trials - start)
        views = torch.cat([masked(pixels, side, generator) for _ in range(count)])
        states = tower_states(vlm.model, views).sum(1)
        total = states if total is None else total + states
    assert total is not None
    return total / trials - tower_states(vlm.model, pixels)[:, 0]


def masked(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A picture (1, C, H, W) of which nearly all patches show the mean of their channel."""
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    order = torch.randperm(rows * columns, generator=generator)
    hidden = torch.zeros(rows * columns, dtype=torch.bool)
    hidden[order[: int(MASKED * rows * columns)]] = True
    hidden = hidden.view(rows, columns).repeat_interleave(side, 0).repeat_interleave(side, 1)
    whole = torch.zeros(pixels.shape[2:], dtype=torch.bool)
    whole[: rows * side, : columns * side] = hidden
    return torch.where(whole.to(pixels.device), pixels.mean((2, 3), keepdim=True), pixels)


def tower_states(model: Any, pixels: Tensor) -> Tensor:
    """What enters the tower's first block and leaves each, (L_v + 1, N, T_v, D_v) float32."""
    blocks, states = compat_parts.vision_blocks(model), []

    def enter(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leave(block: Any, args: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        compat_parts.image_tower(model)(pixels)
    finally:
        for handle in handles:
            handle.remove()
    if any(s.dim() != 3 or len(s) != len(pixels) for s in states):
        raise FoveateError(
            f"The tower of {type(model).__name__} does not read one picture after the other, so it "
            "has no image directions: leave them out with --no-image."
        )
    return torch.stack([s.float().cpu() for s in states])


# -- from differences to a direction


def grouped(difference: Tensor, grouping: Grouping) -> Tensor:
    """(L_v + 1, T_v, D_v) as T_v groups of L_v + 1 states; `ungrouped` undoes it."""
    blocks, tokens, width = difference.shape
    if grouping == "token":
        return difference.transpose(0, 1)
    return difference.reshape(tokens, blocks, width)


def ungrouped(groups: Tensor, grouping: Grouping) -> Tensor:
    tokens, blocks, width = groups.shape
    return groups.transpose(0, 1) if grouping == "token" else groups.reshape(blocks, tokens, width)


def principal(differences: Tensor) -> Tensor:
    """Mean plus first principal component of each group, (n, G, F) -> (G, F), in float64.

    The component has norm 1 and the sign that makes the largest entry of its left singular vector
    positive.
    """
    x = differences.double()
    mean = x.mean(0)
    centred = x - mean
    gram = torch.einsum("ngf,mgf->gnm", centred, centred)
    left = torch.linalg.eigh(gram).eigenvectors[..., -1]  # (G, n)
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    component = torch.einsum("gn,ngf->gf", left * largest.sign(), centred)
    return mean + torch.nn.functional.normalize(component, dim=1)


def text_direction(files: Sequence[Path]) -> Tensor:
    """(L, D) float32, one component over all layers; what enters the first is dropped."""
    differences = torch.stack([_read(file, "text", slice(None)) for file in files])
    direction = principal(differences.flatten(1)[:, None])
    return direction.view(differences.shape[1:])[1:].float()


def image_direction(files: Sequence[Path], grouping: Grouping) -> Tensor:
    """(L_v, T_v, D_v) float32, one component per group; what enters the first is dropped."""
    with safe_open(files[0], "pt") as first:
        tokens, blocks, width = first.get_slice("image").get_shape()
    groups = []
    for start in range(0, tokens, _GROUPS):
        part = torch.stack([_read(f, "image", slice(start, start + _GROUPS)) for f in files])
        groups.append(principal(part.flatten(2)).view(-1, blocks, width))
    return ungrouped(torch.cat(groups), grouping)[1:].float()


def _read(file: Path, name: str, rows: slice) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_slice(name)[rows]


def _digest(one: Demonstration) -> str:
    given = [one.name, one.question, one.true, one.hallucinated]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]
