"""Which attention heads make a model name things that are not there: the lists AD-HH needs.

    find_heads(vlm, samples, vocabulary, out, ...) -> dict        # `foveate heads MODEL`
    pocket_samples(count)      folder_samples(images, objects, synonyms=None)

Published (modular attribution, ICLR 2025): a model describes many images; every mention of an
object is hallucinated or real; at the token that begins the mention each head is removed in turn
(its slice of what enters the output projection is set to zero in the query row that predicts the
token), and the head's influence is what the token's probability loses. A head's score is its mean
influence on hallucinated words minus its mean influence on real ones; the highest are listed.

The published code runs the model once per head and token. Here many heads and tokens share one
forward: each is one query row, fed the same token again at the same position, with a mask in which
it sees the caption's own KV cache up to its place, and itself. The result is the same to rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..backends.transformers import compat
from ..backends.transformers.anatomy import anatomy
from ..base import __version__
from ..base.errors import FoveateError
from ..base.images import decode
from ..base.journal import Journal
from ..vlm.vlm import VLM, Chat

PROMPT = "Please describe this image in detail."
FIRST_SCENE = 900_000_000  # neither a training scene of the pocket model nor held out for its exams
_DIGITS = 8  # of the influences in the records
_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {
    "man": "men", "person": "people", "child": "children", "mouse": "mice", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer",
}  # fmt: skip


# ------------------------------------------------------------------------- words for objects


@dataclass(frozen=True)
class Mention:
    """A word for an object in a text: where it starts (in characters) and what it stands for."""

    start: int
    word: str
    category: str


class Vocabulary:
    """Words for objects, by category.

    A word may have several parts ("hot dog"); of all that fit at a place the longest counts, so a
    hot dog is no dog. Case and hyphens do not matter. Plurals of the last part are found by the
    usual endings (-s, -es, -ies, -ves, -men) and a few irregular ones. A word that two categories
    list belongs to the first.
    """

    def __init__(self, categories: Mapping[str, Iterable[str]]) -> None:
        listed = [
            (tuple(_parts(word)), category)
            for category, words in categories.items()
            for word in (category, *words)
        ]
        self._category: dict[tuple[str, ...], str] = {}
        for phrase, category in listed:
            if phrase:
                self._category.setdefault(phrase, category)
        for phrase, category in listed:  # what is listed wins over a plural that looks like it
            for plural in _plurals(phrase[-1]) if phrase else ():
                self._category.setdefault((*phrase[:-1], plural), category)
        self._longest = max(map(len, self._category), default=0)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """One category per line: its name, then its synonyms, separated by commas.

        CHAIR's synonyms.txt is such a file. Its further rules for compounds are not applied:
        list "baby elephant" with the elephant, or it counts as a baby and an elephant.

        Raises `FoveateError` where the file cannot be read or holds no word.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FoveateError(
                f"The synonyms cannot be read from {path}: {_why(error)}."
            ) from error
        rows = [[word.strip() for word in line.split(",") if _parts(word)] for line in lines]
        categories: dict[str, list[str]] = {}
        for row in rows:
            if row:
                categories.setdefault(row[0], []).extend(row[1:])
        vocabulary = cls(categories)
        if not vocabulary._category:
            raise FoveateError(
                f"{path} lists no words: write one category per line, as `person, man, woman`."
            )
        return vocabulary

    def category(self, word: str) -> str | None:
        """What a word stands for, or None."""
        return self._category.get(tuple(_parts(word)))

    def find(self, text: str) -> list[Mention]:
        """Every mention, repeated ones too, in the order of the text."""
        words = [(m.start(), m[0].lower()) for m in _WORD.finditer(text)]
        found, i = [], 0
        while i < len(words):
            for n in range(min(self._longest, len(words) - i), 0, -1):
                phrase = tuple(word for _, word in words[i : i + n])
                if category := self._category.get(phrase):
                    found.append(Mention(words[i][0], " ".join(phrase), category))
                    i += n
                    break
            else:
                i += 1
        return found

    def state(self) -> list[Any]:
        """What two vocabularies that label alike have in common."""
        return sorted((" ".join(phrase), c) for phrase, c in self._category.items())


def _parts(word: str) -> list[str]:
    return [part.lower() for part in _WORD.findall(word)]


def _plurals(word: str) -> list[str]:
    for singular, plural in _IRREGULAR.items():
        if word == singular:
            return [plural]
        if singular in ("man", "child") and word.endswith(singular):  # and a human: humans
            return [word.removesuffix(singular) + plural, word + "s"]
    if re.search(r"[^aeiou]y$", word):
        return [word[:-1] + "ies"]
    if re.search(r"(?:[sxz]|ch|sh)$", word):
        return [word + "es"]
    if word.endswith("o"):
        return [word + "s", word + "es"]
    if match := re.search(r"[^f]fe?$", word):
        return [word[: match.start() + 1] + "ves", word + "s"]
    return [word + "s"]


# ----------------------------------------------------------------------- images with a truth


@dataclass(frozen=True)
class Sample:
    """An image and the categories of what it shows. `load` raises `FoveateError`."""

    name: str
    objects: frozenset[str]
    load: Callable[[], Image.Image]


def pocket_samples(count: int) -> tuple[list[Sample], Vocabulary]:
    """Drawn scenes, every other one against the pocket model's habits; their kinds as words."""
    from ..scenes import questions, world

    def sample(number: int) -> Sample:
        habit = ("with", "against")[number % 2]
        scene = world.sample(FIRST_SCENE + number, habit)
        objects = frozenset(world.counts(scene))
        return Sample(f"{habit}-{scene.seed}", objects, lambda: world.draw(scene))

    words = {kind: (questions.plural(kind),) for kind in world.KINDS}
    return [sample(number) for number in range(count)], Vocabulary(words)


def folder_samples(
    images: Path, objects: Path, synonyms: Path | None = None
) -> tuple[list[Sample], Vocabulary]:
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
        raise FoveateError(f"The objects cannot be read from {objects}: {_why(error)}.") from error
    truth: dict[str, list[str]] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, present = row["image"], row["objects"]
            if not (isinstance(name, str) and isinstance(present, list)):
                raise TypeError
            if not all(isinstance(word, str) for word in present):
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

    def sample(name: str, words: list[str]) -> Sample:
        known = frozenset(c for c in map(vocabulary.category, words) if c)
        return Sample(name, known, lambda: decode(images / name))

    return [sample(name, words) for name, words in truth.items()], vocabulary


# --------------------------------------------------------------------------------- removal


@dataclass(frozen=True)
class Caption:
    """What a model produced, with everything needed to predict any of its tokens again."""

    ids: Tensor
    """(P + T,) int64: the prompt and the caption."""
    prompt: int
    """P."""
    positions: Tensor
    """(..., T) int64: the position of the query row that predicts each token of the caption, as
    the decoder was given it (one row, three or more under M-RoPE)."""
    cache: Any
    """Keys and values of all but the last token."""


class Ablation:
    """A model whose heads can be removed one by one, many at a time.

    Raises `FoveateError` where the decoder's heads do not meet in `self_attn.o_proj`, or where it
    attends in other ways than to everything before or to a sliding window.
    """

    def __init__(self, model: Any) -> None:
        name, decoder = type(model).__name__, model.get_decoder()
        config = decoder.config
        self.model, self.decoder = model, decoder
        self.projections = [_output_projection(name, layer) for layer in _layers(name, decoder)]
        self.layers, self.heads = len(self.projections), config.num_attention_heads
        self.window: int = getattr(config, "sliding_window", None) or 0
        self.kinds = set(compat.layer_kinds(config))
        if other := sorted(self.kinds - {"full_attention", "sliding_attention"}):
            raise FoveateError(
                f"{name} has layers of {other[0]}, whose rows do not see the KV cache one by one: "
                "its heads cannot be searched."
            )

    @torch.inference_mode()
    def describe(self, inputs: Mapping[str, Any], **options: Any) -> Caption:
        """Produce a caption for one prompt (batch of 1) greedily; `options` go to `generate`."""
        positions: list[Tensor] = []

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("position_ids")
            if given is None:
                embeds, past = kwargs["inputs_embeds"], compat.cache_in(kwargs)
                last = compat.length(past) + embeds.shape[1] - 1
                given = torch.tensor([[last]], device=embeds.device)
            positions.append(given[..., -1:])

        with _removing([self.decoder.register_forward_pre_hook(note, with_kwargs=True)]):
            out = self.model.generate(
                **inputs,
                **compat.passing(self.model, compat.whole_cache()),
                use_cache=True,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                return_dict_in_generate=True,
                **options,
            )
        prompt = inputs["input_ids"].shape[1]
        return Caption(out.sequences[0], prompt, torch.cat(positions, -1), compat.cache_of(out))

    @torch.inference_mode()
    def influence(self, caption: Caption, places: Sequence[int], rows: int = 256) -> Tensor:
        """What the probability of some tokens loses without each head.

        Args:
            places: tokens by their index in the caption, n of them.
            rows: query rows per forward. More need more memory and fewer forwards.

        Returns:
            (n, layers, heads) float32 on the CPU: p(token) - p(token without the head).
        """
        variants = 1 + self.layers * self.heads  # nothing removed, then each head
        found = [
            self._probabilities(caption, [places[i // variants] for i in chunk], chunk, variants)
            for start in range(0, len(places) * variants, rows)
            for chunk in [range(start, min(start + rows, len(places) * variants))]
        ]
        if not found:
            return torch.zeros(0, self.layers, self.heads)
        p = torch.cat(found).view(len(places), variants)
        return (p[:, :1] - p[:, 1:]).view(len(places), self.layers, self.heads)

    def _probabilities(
        self, caption: Caption, places: list[int], chunk: range, variants: int
    ) -> Tensor:
        """p(token) of one place per row (R,), with what `chunk` says removed from it."""
        device = caption.ids.device
        at = torch.tensor(places, device=device)
        query = caption.prompt - 1 + at
        removed: dict[int, tuple[list[int], list[int]]] = {}
        for row, i in enumerate(chunk):
            if i % variants:
                layer, head = divmod(i % variants - 1, self.heads)
                in_layer = removed.setdefault(layer, ([], []))
                in_layer[0].append(row)
                in_layer[1].append(head)
        masks = {kind: self._mask(caption, query, kind) for kind in self.kinds}
        changed = {
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": caption.positions[..., at],
        }

        def steer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | changed

        handles = [self.decoder.register_forward_pre_hook(steer, with_kwargs=True)]
        for layer, (which, heads) in removed.items():
            handles.append(
                self.projections[layer].register_forward_pre_hook(self._remove(which, heads))
            )
        with _removing(handles):
            out = self.model(
                input_ids=caption.ids[query][None],
                use_cache=True,
                **compat.passing(self.model, caption.cache),
            )
        caption.cache.crop(-len(places))
        token = caption.ids[query + 1].to(out.logits.device)
        logits = out.logits[0].float()
        chosen = logits.gather(1, token[:, None])[:, 0]
        return (chosen - logits.logsumexp(-1)).exp().cpu()

    def _mask(self, caption: Caption, query: Tensor, kind: str) -> Tensor:
        """Additive (1, 1, R, keys + R): each row sees what lies before its place, and itself."""
        keys = torch.arange(caption.cache.get_seq_length(), device=query.device)
        seen = keys < query[:, None]
        if kind == "sliding_attention":
            seen &= keys > query[:, None] - self.window
        itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
        seen = torch.cat([seen, itself], 1)[None, None]
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )

    def _remove(self, rows: list[int], heads: list[int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            kept = args[0].clone()
            kept.view(*kept.shape[:2], self.heads, -1)[0, rows, heads] = 0
            return (kept,)

        return hook


def _layers(name: str, decoder: Any) -> Sequence[Any]:
    layers = getattr(decoder, "layers", None)
    if not layers:
        raise FoveateError(f"{name} has no list of decoder layers: its heads cannot be searched.")
    return layers


def _output_projection(name: str, layer: Any) -> nn.Module:
    projection = compat.head_projection(layer)
    if projection is None:
        raise FoveateError(
            f"{name} has a decoder layer without `self_attn.o_proj`, where the heads meet: its "
            "heads cannot be searched."
        )
    return projection


@contextlib.contextmanager
def _removing(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def beginnings(tokenizer: Any, ids: Sequence[int], mentions: Sequence[Mention]) -> list[int]:
    """The tokens (indices into `ids`) that write the first letter of each mention."""
    text = spoken(tokenizer, ids)
    ends, found = 0, []
    for mention in mentions:
        while not spoken(tokenizer, ids[: ends + 1]).startswith(text[: mention.start + 1]):
            ends += 1
        found.append(ends)
    return found


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of some tokens, such that a part of them gives a part of the text."""
    return cast(
        str,
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )


# ------------------------------------------------------------------------------ the search


def find_heads(
    vlm: VLM,
    samples: Sequence[Sample],
    vocabulary: Vocabulary,
    out: Path,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = 128,
    top_k: int | None = None,
    rows: int = 256,
    command: str = "",
) -> dict[str, Any]:
    """Find the heads that favour hallucinated words, and write them to `out` for AD-HH.

    One record per image goes to `out` with the ending .jsonl, at once, and nothing is computed
    twice: the same call goes on where an interrupted one stopped, and more `samples` may be added.

    Args:
        top_k: heads to list. Default: 20 as published for LLaVA-1.5 7B (of 1024), but at most a
            tenth of the model's heads. Heads with a score of 0 or less are never listed.

    Returns:
        What `out` holds: "heads" [[layer, head], ...] from the highest score down, "model" (its
        shape), "name", "revision", "commit", "scores" (layers x heads), "images",
        "hallucinated", "real", "prompt", "version", "command".

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
    if out.suffix == ".jsonl" or out.is_dir():
        raise FoveateError(f"{out} cannot hold the list: give a file that ends in .json.")
    journal = Journal(out.with_suffix(".jsonl"), lambda row: row["image"], settings)
    failures: dict[str, str] = {}
    chosen = {sample.name: sample for sample in samples}
    with contextlib.closing(journal), _Bar(len(chosen)) as bar:
        for sample in chosen.values():
            known = journal.rows.get(sample.name, {})
            if known.get("objects") != _digest(sorted(sample.objects)):
                try:
                    journal.append(_examine(vlm, ablation, sample, vocabulary, settings, rows))
                except FoveateError as error:
                    failures[sample.name] = str(error)
            bar.advance(journal.rows.get(sample.name, {}))
    first = next(iter(failures.values()), "There is none.")
    if len(failures) == len(chosen):
        raise FoveateError(f"No image could be used ({first.rstrip('.')}): check the images.")
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(chosen)} images were left out; the first: {first}",
            stacklevel=2,
        )
    wanted = chosen.keys() - failures.keys()  # in the file's order: sums do not depend on who asks
    records = [row for name, row in journal.rows.items() if name in wanted]
    return _write(out, records, settings, ablation, top_k, command)


def _examine(
    vlm: VLM,
    ablation: Ablation,
    sample: Sample,
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    rows: int,
) -> dict[str, Any]:
    """The record of one image."""
    inputs = vlm.inputs([Chat([sample.load()], settings["prompt"])])
    caption = ablation.describe(
        inputs,
        max_new_tokens=settings["max_new_tokens"],
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    ids = caption.ids[caption.prompt :].tolist()
    text = spoken(vlm.tokenizer, ids)
    mentions = vocabulary.find(text)
    influence = ablation.influence(caption, beginnings(vlm.tokenizer, ids, mentions), rows)
    real = torch.tensor([m.category in sample.objects for m in mentions], dtype=torch.bool)
    return {
        "image": sample.name,
        "objects": _digest(sorted(sample.objects)),
        "caption": text.strip(),
        "hallucinated": [m.word for m, there in zip(mentions, real, strict=True) if not there],
        "real": [m.word for m, there in zip(mentions, real, strict=True) if there],
        "influence": {
            "hallucinated": _rounded(influence[~real].sum(0), _DIGITS),
            "real": _rounded(influence[real].sum(0), _DIGITS),
        },
    }


def _write(
    out: Path,
    records: list[dict[str, Any]],
    settings: dict[str, Any],
    ablation: Ablation,
    top_k: int | None,
    command: str,
) -> dict[str, Any]:
    """Score and rank the heads, and write the list."""
    means, counts = [], {}
    for label in ("hallucinated", "real"):
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
    scores = means[0] - means[1]
    if top_k is None:
        top_k = min(20, -(-scores.numel() // 10))
    order = scores.flatten().argsort(descending=True, stable=True)[:top_k].tolist()
    best = [i for i in order if scores.flatten()[i] > 0]
    if not best:
        raise FoveateError(
            "No head raises hallucinated words more than real ones, so there is no list."
        )
    found = {
        "heads": [list(divmod(i, ablation.heads)) for i in best],
        "model": settings["shape"],
        "name": settings["model"],
        "revision": settings["revision"],
        "commit": settings["commit"],
        "images": len(records),
        **counts,
        "prompt": settings["prompt"],
        "version": __version__,
        "command": command,
        "scores": _rounded(scores, 6),
    }
    lines = [f"{json.dumps(key)}: {_json(value)}" for key, value in found.items()]
    part = out.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    part.replace(out)
    return found


def _json(value: Any) -> str:
    """A list of rows as one line per row."""
    if isinstance(value, list) and len(value) and isinstance(value[0], list) and len(value[0]) > 2:
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "]"
    return json.dumps(value)


class _Bar:
    """Progress on stderr, where somebody watches: images, words so far, time to go."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.words = {"hallucinated": 0, "real": 0}
        self.progress = Progress(
            TextColumn("captions"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, note="")

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def advance(self, record: dict[str, Any]) -> None:
        for label in self.words:
            self.words[label] += len(record.get(label, ()))
        note = f"{self.words['hallucinated']} words hallucinated, {self.words['real']} real"
        self.progress.update(self.task, advance=1, note=note)


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    return [[round(v, digits) for v in row] for row in values.tolist()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _why(error: Exception) -> str:
    """An error of the system in a few words."""
    return getattr(error, "strerror", None) or str(error).rstrip(".")
