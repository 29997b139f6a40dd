"""CHAIR: mentions of objects that are not there; the captions' plurals are listed by hand."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

PAIRS = {
    "wine glass": "wine glass",
    "traffic light": "traffic light",
    "stop light": "stop light",
    "passenger train": "train",
    "baby bird": "bird",
    "adult dog": "dog",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "hot dog": "hot dog",
}
SINGULAR = {
    "puppies": "puppy",
    "stools": "stool",
    "glasses": "glass",
    "gulls": "gull",
    "boats": "boat",
    "women": "woman",
    "lights": "light",
    "seats": "seat",
    "knives": "knife",
    "dogs": "dog",
    "mugs": "mug",
    "ties": "tie",
    "trains": "train",
    "men": "man",
}


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    object_of = {}
    for text in (root / "chair" / "synonyms.txt").read_text().strip().split("\n"):
        for word in text.split(", "):
            object_of[word] = text.split(", ")[0]
    wanted = json.loads((root / "chair" / "image_ids.json").read_text())
    folder = root / "coco" / "annotations"
    instances = json.loads((folder / "instances_val2014.json").read_text())
    captions = json.loads((folder / "captions_val2014.json").read_text())
    names = {kind["id"]: kind["name"] for kind in instances["categories"]}
    bad_captions = bad_mentions = mentions = found = there = length = 0
    for line, image in enumerate(wanted):
        truth = set()
        for box in instances["annotations"]:
            if box["image_id"] == image:
                truth.add(object_of[names[box["category_id"]]])
        for caption in captions["annotations"]:
            if caption["image_id"] == image:
                truth.update(_mentions(caption["caption"], object_of)[0])
        named, words = _mentions(answers["captions", line], object_of)
        invented = [name for name in named if name not in truth]
        bad_captions += len(invented) > 0
        bad_mentions, mentions = bad_mentions + len(invented), mentions + len(named)
        found, there = found + len(truth & set(named)), there + len(truth)
        length += words
    return {
        "chair_s": 100 * bad_captions / len(wanted),
        "chair_i": 100 * bad_mentions / mentions if mentions else nan,
        "recall": 100 * found / there,
        "length": length / len(wanted),
    }


def _mentions(caption: str, object_of: dict[str, str]) -> tuple[list[str], int]:
    """The objects of a caption in order, with repeats, and its number of words and marks."""
    for mark in ".,;":
        caption = caption.replace(mark, f" {mark}")
    words = [SINGULAR.get(word, word) for word in caption.lower().split()]
    joined = []
    while words:
        pair = " ".join(words[:2])
        joined.append(PAIRS.get(pair, words[0]))
        words = words[2 if pair in PAIRS else 1 :]
    named = [word for word in joined if word in object_of]
    if "toilet" in joined:
        named = [word for word in named if word != "seat"]
    return [object_of[word] for word in named], len(joined)
