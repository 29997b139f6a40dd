"""Which attention heads make a model name things that are not there: the lists AD-HH needs.

    find_heads(vlm, samples, vocabulary, out, ...) -> dict        # `foveate heads MODEL`
    pocket_samples(count)      folder_samples(images, objects, synonyms=None)

Published (modular attribution, ICLR 2025): a model describes many images; every mention of an
object is hallucinated or real; at the token that begins the mention each head is removed in turn
(its slice of what enters the output projection is set to zero in the query row that predicts the
token), and the head's influence is what the token's probability loses. A head's score is its mean
influence on hallucinated words minus its mean influence on real ones; the highest are listed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ..backends.transformers.anatomy import anatomy
from ..base.artifact import HEADS, Artifact
from ..base.errors import FoveateError
from ..base.files import writing
from ..base.images import decode
from ..base.journal import Journal
from ..evaluation.vocabulary import Mention, Vocabulary, of_scenes
from ..scenes import world
from ..vlm.chat import Chat
from ..vlm.vlm import VLM
from .ablation import Ablation
from .reading import read_all

PROMPT = "Please describe this image in detail."
FIRST_SCENE = 900_000_000  # neither a training scene of the pocket model nor held out for its exams
LABELS = ("hallucinated", "real")
_DIGITS = 8  # of the influences in the records


# -- labelled images


@dataclass(frozen=True)
class LabelledImage:
    """An image and the categories of what it shows. `load` raises `FoveateError`."""

    name: str
    objects: frozenset[str]
    load: Callable[[], Image.Image]


def pocket_samples(count: int) -> tuple[list[LabelledImage], Vocabulary]:
    """Drawn scenes, every other one against the pocket model's habits; their kinds as words."""

    def sample(number: int) -> LabelledImage:
        habit = ("with", "against")[number % 2]
        scene = world.sample(FIRST_SCENE + number, habit)
        objects = frozenset(world.counts(scene))
        return LabelledImage(f"{habit}-{scene.seed}", objects, lambda: world.draw(scene))

    return [sample(number) for number in range(count)], of_scenes()


def folder_samples(
    images: Path, objects: Path, synonyms: Path | None = None
) -> tuple[list[LabelledImage], Vocabulary]:
    """Images of a folder with what they show, and the words for it.

    Args:
        images: the folder.
        objects: lines of JSON, `{"image": "a.jpg", "objects": ["cup", "hot dog"]}`. Several lines
            on one image add up.
        synonyms: see `Vocabulary.read`. Without it every word of `objects` is its own category.

    Lines that are not of this form, and objects that no category lists, are left out with a
    warning. Raises `FoveateError` where nothing is left.
    """
    if not images.is_dir():
        raise FoveateError(f"There is no folder {images} of images: check the path.")
    try:
        lines = objects.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FoveateError(
            f"The objects cannot be read from {objects}: {error.strerror}."
        ) from error
    truth: dict[str, list[str]] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, present = row["image"], row["objects"]
            if not (
                isinstance(present, list) and all(isinstance(w, str) for w in [name, *present])
            ):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            broken.append(number)
        else:
            truth.setdefault(name, []).extend(present)
    if not truth:
        raise FoveateError(
            f"{objects} has no usable line: write one per image, as "
            '{"image": "a.jpg", "objects": ["cup", "dog"]}.'
        )
    if broken:
        warnings.warn(
            f"{len(broken)} of {len(lines)} lines of {objects} are not of the form "
            f'{{"image": ..., "objects": [...]}} and were left out; the first is line {broken[0]}.',
            stacklevel=2,
        )
    every = {word for words in truth.values() for word in words}
    vocabulary = (
        Vocabulary.read(synonyms) if synonyms else Vocabulary(dict.fromkeys(sorted(every), ()))
    )
    if unknown := sorted(word for word in every if vocabulary.category(word) is None):
        warnings.warn(
            f"{len(unknown)} objects of {objects} are in no category and were left out; the first "
            f"is {unknown[0]!r}.",
            stacklevel=2,
        )

    def sample(name: str, words: list[str]) -> LabelledImage:
        known = frozenset(c for c in map(vocabulary.category, words) if c)
        return LabelledImage(name, known, lambda: decode(images / name))

    return [sample(name, words) for name, words in truth.items()], vocabulary


# -- the search


def find_heads(
    vlm: VLM,
    samples: Sequence[LabelledImage],
    vocabulary: Vocabulary,
    out: Path,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = 128,
    top_k: int | None = None,
    rows: int = 256,
    command: str = "",
    watch: Callable[[int, int, str], None] | None = None,
) -> Artifact:
    """Find the heads that favour hallucinated words, and write them to a folder for AD-HH.

    One record per image goes to a file beside it with the ending .jsonl, at once, and nothing is
    computed twice: the same call goes on where an interrupted one stopped, and more `samples` may
    be added.

    Args:
        top_k: heads to list. Default: 20 as published for LLaVA-1.5 7B (of 1024), but at most a
            tenth of the model's heads. Heads with a score of 0 or less are never listed.
        rows: query rows per forward.
        command: that repeats this search, for the artifact.
        watch: is told after every image how many are done, of how many, and how many words were
            found so far.

    Returns:
        The artifact: "heads" (N, 2) int64, a layer and a head each, from the highest score down,
        and "scores" (layers, heads) float32; made with "name", "revision", "commit", "images",
        "hallucinated", "real", "prompt", "command".

    Raises:
        FoveateError: no image could be used, no word was hallucinated (or none was real), the
            records are of other settings, `out` cannot be written.
    """
    if max_new_tokens < 1 or rows < 1 or (top_k is not None and top_k < 1):
        raise FoveateError("max_new_tokens, rows and top_k must be at least 1.")
    ablation = Ablation(vlm.model)
    settings = {
        **vlm.source,
        "shape": anatomy(vlm.model).shape,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "words": _digest(vocabulary.state()),
    }
    journal = Journal(records_beside(out), lambda row: row["image"], settings)
    words = dict.fromkeys(LABELS, 0)

    def told(done: int, total: int, row: dict[str, Any] | None) -> None:
        for label in LABELS:
            words[label] += len(row[label]) if row else 0
        if watch:
            watch(done, total, counted(words))

    records = read_all(
        journal,
        {sample.name: sample for sample in samples},
        lambda sample: _examine(vlm, ablation, sample, vocabulary, settings, rows),
        current=lambda sample, row: row["objects"] == _digest(sorted(sample.objects)),
        watch=told,
    )
    scores, counts = _scores(records, ablation)
    best = _best(scores, top_k)
    made = {
        "name": settings["model"],
        "revision": settings["revision"],
        "commit": settings["commit"],
        "images": len(records),
        **counts,
        "prompt": prompt,
        "command": command,
    }
    pairs = torch.tensor([divmod(i, ablation.heads) for i in best])
    found = Artifact(
        HEADS, anatomy(vlm.model).shape, {"heads": pairs, "scores": scores.float()}, made=made
    )
    with writing(out, f"all {len(records)} records are safe in {journal.path.name}"):
        found.save_pretrained(out)
    return found


def records_beside(out: Path) -> Path:
    """The file with the records of a search whose artifact goes to the folder `out`."""
    if out.suffix in (".json", ".jsonl", ".safetensors") or out.is_file():
        raise FoveateError(f"{out} cannot be used, a folder is written: give the name of one.")
    return out.with_name(f"{out.name}.jsonl")


def counted(words: Mapping[str, int]) -> str:
    """How many words of each label, in words."""
    return f"{words['hallucinated']} words hallucinated, {words['real']} real"


def _examine(
    vlm: VLM,
    ablation: Ablation,
    sample: LabelledImage,
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    rows: int,
) -> dict[str, Any]:
    """The record of one image."""
    caption = ablation.describe(
        vlm.inputs([Chat([sample.load()], settings["prompt"])]),
        max_new_tokens=settings["max_new_tokens"],
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    ids = caption.ids[caption.prompt :].tolist()
    text = spoken(vlm.tokenizer, ids)
    mentions = vocabulary.find(text)
    influence = ablation.influence(caption, beginnings(vlm.tokenizer, ids, mentions), rows)
    real = torch.tensor([m.category in sample.objects for m in mentions], dtype=torch.bool)
    chosen = {"hallucinated": ~real, "real": real}
    return {
        "image": sample.name,
        "objects": _digest(sorted(sample.objects)),
        "caption": text.strip(),
        **{k: [mentions[i].word for i in rows.nonzero()[:, 0]] for k, rows in chosen.items()},
        "influence": {k: _rounded(influence[rows].sum(0), _DIGITS) for k, rows in chosen.items()},
    }


def beginnings(tokenizer: Any, ids: Sequence[int], mentions: Sequence[Mention]) -> list[int]:
    """The tokens (indices into `ids`) that write the first letter of each mention."""
    text = spoken(tokenizer, ids)
    token, tokens = 0, []
    for mention in mentions:
        while not spoken(tokenizer, ids[: token + 1]).startswith(text[: mention.start + 1]):
            token += 1
        tokens.append(token)
    return tokens


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of some tokens, such that a part of them gives a part of the text."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return cast(str, tokenizer.decode(ids, **options))


def _scores(records: Sequence[dict[str, Any]], ablation: Ablation) -> tuple[Tensor, dict[str, int]]:
    """Score of every head, (layers, heads) float64, and how many words of each label there are."""
    means, counts = [], {}
    for label in LABELS:
        counts[label] = sum(len(record[label]) for record in records)
        if not counts[label]:
            raise FoveateError(
                f"No {label} object word occurs in {len(records)} captions, so there is nothing to "
                "compare and no list: give more images, or words that captions use."
            )
        total = torch.zeros(ablation.layers, ablation.heads, dtype=torch.float64)
        for record in records:
            total += torch.tensor(record["influence"][label], dtype=torch.float64)
        means.append(total / counts[label])
    return means[0] - means[1], counts


def _best(scores: Tensor, top_k: int | None) -> list[int]:
    """Places of the highest scores above 0 in the flattened table, highest first."""
    flat = scores.flatten()
    if top_k is None:
        top_k = min(20, -(-len(flat) // 10))
    best = [i for i in flat.argsort(descending=True, stable=True)[:top_k].tolist() if flat[i] > 0]
    if not best:
        raise FoveateError(
            "No head raises hallucinated words more than real ones, so there is no list."
        )
    return best


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    return [[round(v, digits) for v in row] for row in values.tolist()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
