"""What the pocket model is trained on: a pool of pictures, and packed sequences of questions.

    Pool(folder, scenes, windows, seed).build()   # draws once, then memory-mapped
    dense_batch(pool, items) -> dict              # pictures and what each patch shows
    lesson(view, stage, rng, close) -> conversations   # what one sequence asks
    Packer(processor).item(pool, index, stage, rng) -> Packed
    Packer(processor).texts(number, rng, read) -> Packed    # no picture: hearsay, or a page
    collate(packed) -> dict of arrays

One sequence holds one picture (or two) and many questions about it. Every question sees the
shared start (`<s> USER: <image>...`) and itself only, and its positions continue that start, so
each is computed exactly as if it had been asked alone.
"""

import json
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import FoveateError
from ..base.files import keep_room, make_folder, write_text, writing
from . import questions, texts, world
from .phrases import SUFFIXES
from .questions import Question, View
from .world import KINDS, VALUES, WHOLE, Box, Scene

SIZE, PATCH = 96, 8  # pixels of the pocket model's picture, and of a patch
SIDE = SIZE // PATCH
VISUAL_TOKENS = SIDE**2
IGNORE = -100
FIRST_TEXT = 500_000_000  # the scenes of texts: neither a picture's nor held out
PAGE = 96  # tokens of a page of text, nearly always more than a caption has
PROMPTS = 0.2  # weight of a question's tokens where a text is learnt whole
GLYPHS = world.LETTERS + world.DIGITS
CHUNK, CHUNKS = 80, {0: 4, 1: 4, 2: 3}  # room for questions after so many pictures
LEAP = 2 * VISUAL_TOKENS  # positions that a text without pictures may skip, see `Packer.pack`
# the words whose embeddings the visual tokens of a patch are trained towards
DENSE: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, "background"),
    **VALUES,
    "print": (*GLYPHS.lower(), "nothing"),
    "row": ("top", "middle", "bottom"),
    "column": ("left", "center", "right"),
    "number": ("one", "two", "three", "four"),
}
TAG = {name: column for column, name in enumerate(DENSE)}
SOME_PRINT = len(GLYPHS) + 1  # a print that cannot be read at this size


def window_box(scene: Scene, rng: random.Random) -> Box:
    """A window of about half the side, mostly around a printed thing."""
    side = 0.5 if rng.random() < 0.5 else rng.uniform(0.42, 0.56)
    printed = [t for t in scene.things if t.print and max(t.width, t.height) < side]
    if printed and rng.random() < 0.75:
        return questions.window_around(rng.choice(printed), rng, side)
    x, y = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
    return (x, y, x + side, y + side)


def patch_owners(index: np.ndarray) -> np.ndarray:
    """uint8 (144,): the thing each patch shows, 255 background, 254 a mixture not to learn from."""
    cut = index.reshape(SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 1, 3)
    blocks = cut.reshape(VISUAL_TOKENS, -1)
    things = np.unique(blocks[blocks != 255])
    if not len(things):
        return np.full(VISUAL_TOKENS, 255, np.uint8)
    pixels = np.stack([(blocks == i).sum(1) for i in things])
    owners = things[pixels.argmax(0)]
    owners[pixels.max(0) < 0.2 * blocks.shape[1]] = 254
    owners[pixels.sum(0) == 0] = 255
    return owners


class Pool:
    """Pictures drawn once: items below `scenes` are whole, the rest windows of the first ones."""

    def __init__(self, folder: Path, scenes: int, windows: int, seed: int = 0, first: int = 0):
        if windows > scenes:
            raise ValueError("a pool cannot have more windows than scenes")
        self.folder, self.scenes, self.windows = Path(folder), scenes, windows
        self.seed, self.first = seed, first
        self.pixels: np.ndarray = np.empty(0)
        self.owners: np.ndarray = np.empty(0)

    def __len__(self) -> int:
        return self.scenes + self.windows

    def view(self, item: int) -> tuple[Scene, Box]:
        """The scene of an item and the part of it that the picture shows."""
        whole = item < self.scenes
        scene = _scene(
            self.first + self.seed * 10_000_019 + (item if whole else item - self.scenes)
        )
        return scene, WHOLE if whole else window_box(scene, random.Random(f"window-{scene.seed}"))

    def draw(self, items: range) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.empty((len(items), SIZE, SIZE, 3), np.uint8)
        owners = np.empty((len(items), VISUAL_TOKENS), np.uint8)
        for row, item in enumerate(items):
            scene, box = self.view(item)
            picture, index = world.labelled(scene, box, SIZE, 2 + item % 2)
            pixels[row], owners[row] = np.asarray(picture), patch_owners(index)
        return pixels, owners

    def build(self, workers: int = 2, watch: Callable[[int, int], None] | None = None) -> "Pool":
        """Draw what is not on disk yet, in parallel, and map it.

        Args:
            watch: is told how many pictures are drawn, and of how many.
        """
        make_folder(self.folder)
        about = {"items": len(self), "scenes": self.scenes, "seed": self.seed, "first": self.first}
        note = self.folder / "pool.json"
        paths = [self.folder / "pixels.npy", self.folder / "owners.npy"]
        if not (note.exists() and json.loads(note.read_text()) == about):
            (self.folder / "features.npy").unlink(missing_ok=True)  # of older pictures
            shapes = [(len(self), SIZE, SIZE, 3), (len(self), VISUAL_TOKENS)]
            with writing(self.folder, "nothing is lost"):
                arrays = [new_array(p, np.uint8, s) for p, s in zip(paths, shapes, strict=True)]
            parts = [range(i, min(i + 200, len(self))) for i in range(0, len(self), 200)]
            with ProcessPoolExecutor(workers, get_context("fork")) as drawers:
                for part, drawn in zip(parts, drawers.map(self.draw, parts), strict=True):
                    for array, new in zip(arrays, drawn, strict=True):
                        array[part.start : part.stop] = new
                    if watch:
                        watch(part.stop, len(self))
            for array in arrays:
                array.flush()
            write_text(note, json.dumps(about))
        try:
            self.pixels, self.owners = (np.load(p, mmap_mode="r") for p in paths)
        except (OSError, ValueError, EOFError) as error:
            raise FoveateError(
                f"{self.folder} is damaged ({error}): delete it, and it is drawn again."
            ) from error
        return self


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A .npy file to write to as memory. Raises `OSError` where the disk has no room for it."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    keep_room(path)
    return array


@lru_cache(maxsize=4096)
def _scene(seed: int) -> Scene:
    return world.sample(seed, "with")


# --------------------------------------------------------------------------- dense labels


def dense_batch(pool: Pool, items: list[int]) -> dict[str, np.ndarray]:
    """`pixels` uint8 (B, 96, 96, 3); `labels` int64 (B, 144, 8) by DENSE; `centers` (B, 144, 2)."""
    labels = np.full((len(items), VISUAL_TOKENS, len(DENSE)), IGNORE, np.int64)
    centers = np.full((len(items), VISUAL_TOKENS, 2), np.nan, np.float32)
    for row, item in enumerate(items):
        scene, box = pool.view(item)
        owners, view = pool.owners[item], questions.look(scene, box)
        labels[row, owners == 255, TAG["kind"]] = len(KINDS)
        counts = view.counts()
        for i, thing in enumerate(scene.things):
            mine = owners == i
            if not mine.any():
                continue
            u, v = world.within(thing, box)
            number = counts.get(thing.kind, 0)
            label = {
                **{name: values.index(getattr(thing, name)) for name, values in VALUES.items()},
                "kind": list(KINDS).index(thing.kind),
                "print": len(GLYPHS),
                "row": min(2, max(0, int(v * 3))),
                "column": min(2, max(0, int(u * 3))),
                "number": number - 1 if 1 <= number <= len(DENSE["number"]) else IGNORE,
            }
            if not view.whole:
                label["size"] = IGNORE
            if thing.print and view.whole:
                label["print"] = SOME_PRINT
            elif thing.print:
                label["print"] = GLYPHS.index(thing.print) if i in view.seen else IGNORE
            for name, value in label.items():
                labels[row, mine, TAG[name]] = value
            centers[row, mine] = (u, v)
    return {"pixels": pool.pixels[items], "labels": labels, "centers": centers}


# ------------------------------------------------------------------------- what is asked

# share of the yes/no pairs per category, in whole scenes and in windows
PAIRS = {"existence": 8, "attribute": 6, "number": 4, "relation": 6, "position": 2, "print": 1.5}
PAIRS_WINDOW = {"existence": 4, "attribute": 3, "number": 1, "relation": 2, "position": 1,
                "print": 7}  # fmt: skip


def lesson(view: View, stage: str, rng: random.Random, close: View) -> list[list[Question]]:
    """Conversations, mostly of one question, for one sequence.

    Args:
        stage: "captions" (nothing else), "caption" (and some open questions), "open" or "yesno".
        close: the view in which print is legible, if any; else `view` again.
    """
    asked: list[Question | None] = []
    if stage == "captions":
        asked = [questions.caption(view, rng, short) for short in (False, True, False, True, False)]
    elif stage == "caption":
        asked = [questions.caption(view, rng, short) for short in (False, True, False)]
        asked += [questions.opened(view, rng) for _ in range(8)]
    else:
        if rng.random() < (0.3 if stage == "open" else 0.15):
            asked.append(questions.caption(view, rng, short=rng.random() < 0.4))
        for _ in range(26 if stage == "open" else 8):
            if not close.whole and rng.random() < 0.35:
                asked.append(questions.opened(close, rng, "print"))
            else:
                asked.append(questions.opened(view, rng))
    if stage == "yesno":
        shares = PAIRS if view.whole else PAIRS_WINDOW
        for _ in range(13):
            category = rng.choices(list(shares), list(shares.values()))[0]
            pair = questions.pairs(close if category == "print" else view, rng, category)
            if pair and not set(pair) & set(asked):  # whole pairs, or yes would be rarer
                asked += pair
    kept = [_suffixed(q, rng) for q in dict.fromkeys(asked) if q is not None]
    rest = kept[1:]
    rng.shuffle(rest)
    turns: list[list[Question]] = []
    for question in kept[:1] + rest:
        if turns and len(turns[-1]) == 1 and rng.random() < 0.06:
            turns[-1].append(question)
        else:
            turns.append([question])
    return turns


def _suffixed(question: Question, rng: random.Random) -> Question:
    """Sometimes with a suffix of the benchmarks that fits its form."""
    if question.category == "caption" or rng.random() > 0.08:
        return question
    suffix = rng.choice(SUFFIXES if question.label else SUFFIXES[::2])
    return replace(question, text=question.text + suffix)


# ------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed:
    """One training sequence; `images` are pool items in the order of their <image> runs."""

    images: tuple[int, ...]
    ids: np.ndarray  # int64 (S,)
    positions: np.ndarray  # int64 (S,)
    segments: np.ndarray  # int64 (S,): 0 the shared start, 1.. the questions, -1 padding
    labels: np.ndarray  # int64 (S,): what position t must predict, or IGNORE
    weights: np.ndarray  # float32 (S,)
    asked: tuple[tuple[Question, int], ...]  # each question and where its answer is predicted


class Packer:
    """Turns pictures into packed sequences with the processor's own token ids."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.image = processor.tokenizer.convert_tokens_to_ids("<image>")
        self.ids = lru_cache(maxsize=200_000)(self._encode)
        empty = processor.apply_chat_template([{"role": "user", "content": ""}])
        start = empty[: empty.index("USER:") + len("USER:")]  # a system prompt, if there is one
        self.start = [processor.tokenizer.bos_token_id, *self.ids(start)]
        self.end = processor.tokenizer.eos_token_id

    def _encode(self, text: str) -> list[int]:
        return list(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def pack(
        self,
        images: tuple[int, ...],
        turns: list[list[Question]],
        prompts: float = 0.0,
        leaps: random.Random | None = None,
        page: tuple[int, ...] = (),
    ) -> Packed:
        """Each element of `turns` is one conversation about the images, mostly of one question.

        Args:
            prompts: weight of the questions' own tokens; 0 learns the answers alone.
            leaps: draws positions to skip, up to `LEAP` in half of the conversations, before a
                word of each: so a text teaches distances that only pictures will bring (as PoSE
                does, arXiv 2309.10400).
            page: text that stands where pictures would; learnt as questions are.
        """
        ids = [*self.start, *page, *([self.image] * (VISUAL_TOKENS * len(images)))]
        prefix = len(ids)
        length = prefix + CHUNK * CHUNKS[len(images)]
        positions, segments = list(range(prefix)), [0] * prefix
        labels, weights = [IGNORE] * prefix, [0.0] * prefix
        if page and prompts:
            at = slice(len(self.start) - 1, len(self.start) - 1 + len(page))
            labels[at], weights[at] = list(page), [prompts] * len(page)
        asked: list[tuple[Question, int]] = []
        for segment, conversation in enumerate(turns, start=1):
            new: list[int] = []
            target: list[int] = []
            weight: list[float] = []
            answers: list[tuple[Question, int]] = []
            for k, question in enumerate(conversation):
                prompt = self.ids(f"{'USER: ' if k else ''}{question.text} ASSISTANT:")
                answer = [*self.ids(question.answer), self.end]
                each = 0.3 if question.category == "caption" else 1.0
                new += prompt + answer
                target += (prompt[1:] if prompts else [IGNORE] * (len(prompt) - 1)) + answer
                target += [IGNORE]
                weight += [prompts] * (len(prompt) - 1) + [each] * (len(answer) - 1) + [0.2, 0.0]
                answers.append((question, len(new) - len(answer) - 1))
            if len(new) > CHUNK or len(ids) + len(new) > length:
                continue
            asked += [(q, len(ids) + at) for q, at in answers]
            places = np.arange(prefix, prefix + len(new))
            if leaps and leaps.random() < 0.5:
                places[leaps.randrange(len(new)) :] += leaps.randrange(LEAP)
            positions += places.tolist()
            segments += [segment] * len(new)
            ids, labels, weights = ids + new, labels + target, weights + weight
        rest = length - len(ids)
        return Packed(
            images,
            np.array(ids + [0] * rest),
            np.array(positions + [0] * rest),
            np.array(segments + [-1] * rest),
            np.array(labels + [IGNORE] * rest),
            np.array(weights + [0.0] * rest, np.float32),
            tuple(asked),
        )

    def texts(self, number: int, rng: random.Random, read: bool) -> Packed:
        """A sequence of text alone about the scene of that number: hearsay, or a page to read."""
        scene = world.sample(FIRST_TEXT + number, "with")
        if not read:
            return self.pack((), texts.hearsay(scene, rng), PROMPTS, rng)
        words = (i for sentence in texts.page(scene, rng) for i in self.ids(sentence))
        page = tuple(islice(words, PAGE))
        return self.pack((), texts.reading(scene, rng), PROMPTS, rng, page)

    def item(
        self, pool: Pool, index: int, stage: str, rng: random.Random, both: bool = False
    ) -> Packed:
        """A sequence about one pool item; with `both`, a window comes after its whole scene."""
        scene, box = pool.view(index)
        view = close = questions.look(scene, box)
        if not both:
            return self.pack((index,), lesson(view, stage, rng, close))
        if rng.random() < 0.7:  # then print is asked of the window, the rest of the scene
            view = questions.look(scene)
        return self.pack((index - pool.scenes, index), lesson(view, stage, rng, close))


def collate(packed: list[Packed]) -> dict[str, np.ndarray]:
    """Stack sequences of equally many pictures."""
    names = ("ids", "positions", "segments", "labels", "weights")
    return {name: np.stack([getattr(one, name) for one in packed]) for name in names}
