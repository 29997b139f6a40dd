"""`foveate doctor`: what is installed, what works here, what works on a model."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from ..base import __version__
from ..base.errors import FoveateError
from . import app
from .common import RevisionOption, hint, quiet

EXTRAS = {
    "matplotlib": "plot: pictures of attention",
    "accelerate": "train, and models over several devices",
    "flash-attn": "attention of the untouched rows on CUDA",
    "torchvision": "vision: the processors of families with video",
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
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "idefics2",
    "glm4v",
    "lfm2_vl",
    "kimi_k25",
    "gemma4",
    "llama4",
    "paligemma",
    "molmo2",
    "minicpmv4_6",
    "glm46v",
)
"""The families that the tests cover. Others work where their attention goes through transformers'
interface."""

PROBED = 640, 480
"""The picture size, width and height, at which `--probe` looks."""


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Check this model instead. No weights are needed."),
    ] = None,
    revision: RevisionOption = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="With --model: load the weights and look where image tokens lie."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was found with --model as JSON.")
    ] = False,
) -> None:
    """Say what is installed and what works here, or with --model what works on a model.

    The exit code is 1 if foveate itself does not work here, or refuses the model.
    """
    quiet()
    if (as_json or revision or probe) and not model:
        option = "--json" if as_json else "--revision" if revision else "--probe"
        raise FoveateError(f"{option} is about a model: name one with --model.")
    if model:
        report = examine(model, revision, probe)
        if as_json:
            print(json.dumps(report, indent=1))
            raise typer.Exit(1 if report["refusal"] else 0)
        lines = model_lines(report)
    else:
        lines = installation_lines()
    healthy = True
    for line in lines:
        healthy &= line.good is not False
        mark = {True: "ok  ", False: "BAD ", None: "    "}[line.good]
        print(f"{mark}{line.subject}: {line.finding}", flush=True)
    if healthy:
        hint(
            f'foveate ask photo.jpg "Is there a cup?" --model {model} --method all'
            if model
            else 'foveate ask demo "Is there a car in the image?"; --model M: what works on M'
        )
    raise typer.Exit(0 if healthy else 1)


@dataclass(frozen=True)
class Line:
    """One finding. `good` is None where it is neither good nor bad."""

    subject: str
    finding: str
    good: bool | None = None


# -- this installation -----------------------------------------------------------------------------


def installation_lines() -> Iterator[Line]:
    """Findings in order, the slowest last; `good=False` means that foveate is broken here."""
    yield Line("foveate", f"{__version__} on Python {platform.python_version()}", True)
    for package in ("torch", "transformers", "pillow", "numpy"):
        yield Line(package, importlib.metadata.version(package), True)
    for package, use in EXTRAS.items():
        version = _version(package)
        yield Line(package, f"{version or 'not installed'} ({use})", bool(version) or None)
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
    from ..backends.transformers import compat_parts

    if not compat_parts.has_family(name):
        return Line(f"family {name}", "needs a newer transformers")
    if compat_parts.needs_torchvision(name) and not _version("torchvision"):
        return Line(f"family {name}", "model yes, processor needs torchvision")
    return Line(f"family {name}", "usable", True)


def _pocket() -> Line:
    """Load the pocket model and let it answer, plain and with CLVS."""
    from ..scenes import questions, world
    from ..vlm import VLM

    try:
        vlm = VLM.load("pocket", device="cpu")
        picture = world.draw(world.sample(questions.FIRST_HELD_OUT), 96)
        answers = [vlm.ask(picture, "Is there a tree?", method) for method in (None, "clvs")]
    except FoveateError as error:
        return Line("pocket model", str(error), False)
    seconds = sum(answer.seconds for answer in answers)
    return Line("pocket model", f"answers plain and with clvs in {seconds:.2f} s", True)


# -- one model -------------------------------------------------------------------------------------


def examine(name: str, revision: str | None = None, probe: bool = False) -> dict[str, Any]:
    """What foveate finds in a model, from its configuration alone.

    Args:
        probe: load the weights, too, and look where the tokens of a picture lie.

    Returns:
        JSON-ready: "model", "revision", "commit", "class", "model_type", "versions"; "refusal", a
        sentence or None. Of a model that is not refused also "cache_argument", "attention",
        "layers" (kind -> 0-based layers), "image_tokens" (ids), "layout" (see `_layout`),
        "padded_batches", "static_cache", "compiled_decoding" (each whether it is there), and
        "methods" (name -> "layers" where it acts, None where it acts on none, "note" and
        "refusal", sentences or None), "stop_test" ("layers" that CLVS tests at most, "share" of a
        decoded token's work that one test is, "decode", times plain decoding with all of them; or
        None).

    Raises:
        FoveateError: the model cannot be found, or sees nothing.
    """
    import torch

    from ..backends.transformers import compat
    from ..backends.transformers.handshake import handshake
    from ..core.visual import visual_token_ids
    from ..vlm.loading import commit, outline

    model = outline(name, revision)
    report: dict[str, Any] = {
        "model": name,
        "revision": revision,
        "commit": commit(name, revision),
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "versions": {
            "foveate": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": compat.VERSION,
        },
        "refusal": None,
    }
    try:
        hands = handshake(model)
    except FoveateError as error:
        return report | {"refusal": str(error)}
    kinds = {
        kind: [i for i, other in enumerate(hands.kinds) if other == kind]
        for kind in dict.fromkeys(hands.kinds)
    }
    layout = _layout(model, report, probe)
    return report | {
        "cache_argument": hands.cache,
        "attention": hands.attention,
        "layers": kinds,
        "image_tokens": list(visual_token_ids(model.config)),
        "layout": layout,
        "padded_batches": compat.takes_masks(model),
        "static_cache": compat.static_cache(model),
        "compiled_decoding": compat.static_decoding(model),
        "methods": _methods(model, layout["known"] is not False),
        "stop_test": _stop_test(model),
    }


def _layout(model: Any, report: dict[str, Any], probe: bool) -> dict[str, Any]:
    """How it is known where the model's image tokens lie on the image.

    Returns:
        "by" ("file" or "probe"), "file" (its module, or None), "known" (None where nobody has
        looked yet), "needed" (the least confidence of the probe) and "looked": per size of
        pictures that was looked at "size" (width, height), "confidence", "pictures" (how many it
        took) and "agrees", how many tokens lie where the file says, of how many, or None.
    """
    from ..families.layout import layout_of
    from ..families.probe import NEEDED
    from ..vlm.probing import kept

    file = layout_of(model.config)
    found = kept(report["model"], report["commit"]) if file is None else {}
    looked = [_looked(size, one) for size, one in found.items()]
    if probe:
        looked = _look(report["model"], report["revision"])
    sure = [one["confidence"] >= NEEDED for one in looked]
    return {
        "by": "probe" if file is None else "file",
        "file": file and file.__module__,
        "known": True if file else any(sure) if sure else None,
        "needed": NEEDED,
        "looked": looked,
    }


def _look(name: str, revision: str | None) -> list[dict[str, Any]]:
    from PIL import Image

    from ..families.layout import layout_of
    from ..families.probe import agreement
    from ..vlm import VLM
    from ..vlm.probing import Looked

    vlm = VLM.load(name, revision=revision)
    found = Looked(vlm).found(PROBED)
    agrees = None
    if layout_of(vlm.model.config):
        grids = vlm.grids(vlm.chat([Image.new("RGB", PROBED)], "?", None))
        agrees = agreement(found, grids)
    return [_looked(PROBED, found) | {"agrees": agrees}]


def _looked(size: tuple[int, int], found: Any) -> dict[str, Any]:
    confidence = round(found.confidence, 3)
    return {
        "size": size,
        "confidence": confidence,
        "pictures": found.pictures,
        "agrees": None,
    }


def _stop_test(model: Any) -> dict[str, Any] | None:
    """What CLVS's stop test may cost while decoding, from the sizes of the weights.

    A decoded token reads every weight of the language model once. Each layer that is tested reads
    the output embeddings once more. None where CLVS does not act.
    """
    from ..backends.transformers.anatomy import anatomy
    from ..methods.clvs import CLVS

    own = anatomy(model)
    try:
        tested = len(CLVS().resolve(own).setup(own).tested)
    except FoveateError:
        return None
    head = model.get_output_embeddings().weight.numel()
    decoder = model.get_decoder()
    table = decoder.get_input_embeddings().weight.numel()  # of which a token reads one row
    share = head / (sum(p.numel() for p in decoder.parameters()) - table + head)
    return {"layers": tested, "share": round(share, 4), "decode": round(1 + tested * share, 2)}


def _methods(model: Any, placed: bool) -> dict[str, dict[str, Any]]:
    """Where every method acts with its published parameters, or why it does not.

    Args:
        placed: whether it is known, or can be looked for, where image tokens lie.
    """
    from ..backends.transformers.anatomy import anatomy
    from ..core.method import methods

    shape, report = replace(anatomy(model), placed=placed), {}
    for name, cls in methods().items():
        layers = refusal = None
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            try:
                layers = cls().resolve(shape).layers
            except FoveateError as error:
                refusal = str(error)
        report[name] = {
            "layers": layers and list(layers),
            "note": str(notes[0].message) if notes else None,
            "refusal": refusal,
        }
    return report


def model_lines(report: dict[str, Any]) -> Iterator[Line]:
    """The findings of `examine` as lines."""
    yield Line("model", f"{report['model']} ({report['class']}, {report['model_type']})")
    if report["commit"]:
        yield Line("commit", report["commit"])
    for package, version in report["versions"].items():
        yield Line(package, version)
    if report["refusal"]:
        yield Line("handshake", report["refusal"], False)
        return
    yield Line("handshake", "the model can be enhanced", True)
    yield Line("cache argument", report["cache_argument"])
    yield Line("attention", report["attention"])
    for kind, layers in report["layers"].items():
        yield Line(f"layers of {kind}", f"{len(layers)} ({ranges(layers)})")
    ids = ", ".join(map(str, report["image_tokens"]))
    yield Line("image tokens", ids or "named nowhere: pass image_token_id to enhance()", bool(ids))
    yield _layout_line(report["layout"])
    for key, what in (
        ("padded_batches", "padded batches"),
        ("static_cache", "static cache"),
        ("compiled_decoding", "compiled decoding"),
    ):
        yield Line(what, "yes" if report[key] else "no", report[key] or None)
    if report["stop_test"]:
        yield _stop_line(report["stop_test"])
    for name, entry in report["methods"].items():
        if entry["refusal"]:
            yield Line(name, entry["refusal"])
        else:
            layers = entry["layers"] or []
            where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"
            where = where if layers else "outside the layers"
            yield Line(name, f"{where}. {entry['note']}" if entry["note"] else where, True)


def _stop_line(test: dict[str, Any]) -> Line:
    return Line(
        "clvs's stop test",
        f"up to {test['layers']} tests per token, each {test['share']:.0%} of a plain token: "
        f"decoding takes up to {test['decode']:.2f} times as long. clvs(stop_threshold=0) leaves "
        "it out",
    )


def _layout_line(layout: dict[str, Any]) -> Line:
    seen = "; ".join(_seen(one) for one in layout["looked"])
    if layout["by"] == "file":
        told = f"known, from {layout['file']}"
        return Line("image layout", f"{told}; {seen}" if seen else told, True)
    if layout["known"] is None:
        return Line(
            "image layout",
            "in no file, so it is looked for once the weights are loaded, some twenty pictures for "
            "every new size of pictures; --probe looks now",
        )
    if layout["known"]:
        return Line("image layout", f"in no file; {seen}", True)
    lost = f"{layout['needed']} is needed: no heat maps on the image, no crops"
    return Line("image layout", f"in no file, and not known; {seen}, and {lost}")


def _seen(one: dict[str, Any]) -> str:
    told = "looking found it with confidence {confidence:.2f} at {size[0]} x {size[1]} pixels"
    if one["agrees"] is not None:
        told += ", and {agrees[0]} of {agrees[1]} tokens are where the file says"
    return told.format(**one)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in words: "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
