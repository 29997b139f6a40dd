"""What is installed, what works here, and whether the pocket model answers."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from . import __version__, compat

EXTRAS = {
    "matplotlib": "plot: pictures of attention",
    "accelerate": "train, and models over several devices",
    "flash-attn": "attention of the untouched rows on CUDA",
    "torchvision": "the processors of families with video",
}
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "idefics3",
    "mistral3",
    "gemma3",
)
"""Families that the test-suite covers; others work where their attention goes through
transformers' interface."""


@dataclass(frozen=True)
class Line:
    """One finding. `good` is None where it is neither good nor bad."""

    what: str
    found: str
    good: bool | None = None


def check() -> Iterator[Line]:
    """Findings in order, the slowest last; `good=False` means that foveate is broken here."""
    yield Line("foveate", f"{__version__} on Python {platform.python_version()}", True)
    for package in ("torch", "transformers", "pillow", "numpy"):
        yield Line(package, importlib.metadata.version(package), True)
    for package, use in EXTRAS.items():
        found = _version(package)
        yield Line(package, f"{found or 'not installed'} ({use})", bool(found) or None)
    yield from _devices()
    for family in FAMILIES:
        yield _family(family)
    yield _pocket()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Line]:
    import torch

    yield Line("cpu", f"{platform.machine()}, threads: {torch.get_num_threads()}", True)
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield Line(f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB", True)
    if torch.backends.mps.is_available():
        yield Line("mps", "available", True)


def _family(name: str) -> Line:
    """Whether the installed transformers has the model, and its processor can be built."""
    processor = compat.processor_class(name)
    if processor is None:
        return Line(f"family {name}", "needs a newer transformers")
    video = "video_processor" in inspect.signature(processor.__init__).parameters
    if (video or "torchvision" in compat.backends(processor)) and not _version("torchvision"):
        return Line(f"family {name}", "model yes, processor needs torchvision")
    return Line(f"family {name}", "usable", True)


def _pocket() -> Line:
    """Load the pocket model and let it answer, plain and with CLVS."""
    from .method import FoveateError
    from .pocket import questions, world
    from .vlm import VLM

    try:
        vlm = VLM.load("pocket", device="cpu")
        picture = world.draw(world.sample(questions.FIRST_HELD_OUT), 96)
        answers = [vlm.ask(picture, "Is there a tree?", method) for method in (None, "clvs")]
    except FoveateError as error:
        return Line("pocket model", str(error), False)
    seconds = sum(answer.seconds for answer in answers)
    return Line("pocket model", f"answers plain and with clvs in {seconds:.2f} s", True)
