"""The checks. Each is one function, whose first line says what it checks.

Of the model: `MODEL`, called with the lab. Of the plain model and of every method: `METHOD`, called
with the lab and the stack. A check refuses by `FoveateError` what foveate itself refuses.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...backends.transformers import compat
from ...backends.transformers.anatomy import anatomy
from ...backends.transformers.handshake import handshake
from ...base.errors import FoveateError
from ...core.method import get
from ...core.visual import visual_mask, visual_token_ids
from ...families.layout import Grid
from ...vlm.prefix import ask_together, prepare
from .lab import HALF, QUESTIONS, SLACK, TOKENS, Finding, Lab, Produced, Stack, apart, distance

REPEATED = 3  # timings
PLACES = (0.15, 0.5, 0.85)  # of bright patches, along both sides


# -- of the model ----------------------------------------------------------------------------------


def handshaken(lab: Lab) -> Finding:
    """The model has what foveate needs."""
    try:
        hands = handshake(lab.vlm.model)
    except FoveateError as error:
        return Finding(False, str(error))
    kinds = {kind: hands.kinds.count(kind) for kind in dict.fromkeys(hands.kinds)}
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    numbers = {"attention": hands.attention, "layers": kinds}
    return Finding(True, f"{told}, attention {hands.attention}", numbers)


def layout(lab: Lab) -> Finding:
    """A bright patch on a dark picture changes most the token that lies there."""
    size = lab.pictures[0].size
    dark = Image.new("RGB", size)
    plain, where = _seen(lab, dark)
    step = max((grid.box[2] - grid.box[0]) / grid.cols for grid in where)
    tall = max((grid.box[3] - grid.box[1]) / grid.rows for grid in where)
    hits = tries = 0
    for x in PLACES:
        for y in PLACES:
            spot = (x - step / 2, y - tall / 2, x + step / 2, y + tall / 2)
            bright = dark.copy()
            edges = [round(v * size[i % 2]) for i, v in enumerate(spot)]
            ImageDraw.Draw(bright).rectangle(edges, fill="white")
            change = (_seen(lab, bright)[0] - plain).float().norm(dim=-1).cpu()
            for grid in where:
                if grid.token(x, y) is None:
                    continue
                tries += 1
                hits += _near(grid, change, x, y)
    told = f"{hits} of {tries} bright patches are where the layout says"
    return Finding(hits == tries, told, {"found": hits, "patches": tries})


def _seen(lab: Lab, picture: Image.Image) -> tuple[Tensor, list[Grid]]:
    """The visual tokens (N_v, D) as they enter the decoder, and the grids they lie on."""
    chat = lab.vlm.chat([picture], QUESTIONS[0], None)
    inputs, kept = lab.vlm.inputs([chat]), list[Tensor]()
    layer = compat.decoder_of(lab.vlm.model).layers[0]

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(compat.hidden_in(args, kwargs)[0])

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            lab.vlm.model(**inputs)
    finally:
        handle.remove()
    ids = visual_token_ids(lab.vlm.model.config)
    mask = visual_mask(ids, inputs.get("input_ids"), inputs.get("mm_token_type_ids"))[0]
    return kept[0][mask.to(kept[0].device)], lab.vlm.grids(chat)


def _near(grid: Grid, change: Tensor, x: float, y: float) -> bool:
    """Whether the cell that changed most touches the point's cell."""
    heat = grid.heat(change)
    row, col = divmod(int(heat.argmax()), grid.cols)
    left, top, right, bottom = grid.box
    at = (x - left) / (right - left) * grid.cols, (y - top) / (bottom - top) * grid.rows
    return abs(col + 0.5 - at[0]) <= 1.5 and abs(row + 0.5 - at[1]) <= 1.5


def sinks(lab: Lab) -> Finding:
    """VAR knows or finds dimensions in which attention sinks show."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dims = getattr(get("var")().resolve(anatomy(lab.vlm.model)), "sink_dims", None) or ()
    if not dims:
        return Finding(None, str(said[0].message) if said else "none found: var does nothing")
    return Finding(None, f"dimensions {', '.join(map(str, dims))}", {"sink_dims": list(dims)})


def heads(lab: Lab) -> Finding:
    """AD-HH has a list of heads for this model."""
    pairs = getattr(get("adhh")().resolve(anatomy(lab.vlm.model)), "heads", ())
    return Finding(None, f"a list of {len(pairs)} heads", {"heads": len(pairs)})


# -- of the plain model and of every method --------------------------------------------------------


def neutral(lab: Lab, stack: Stack) -> Finding:
    """With neutral parameters the method is the plain model, bit for bit."""
    if not stack:
        return Finding(None, "about methods only")
    idle = tuple(type(m)(**m.neutral) for m in stack if m.neutral)
    if len(idle) < len(stack):
        return Finding(None, "no parameters make it the plain model")
    same = torch.equal(lab.forward(idle), lab.forward(()))
    return Finding(same, "equal to plain" if same else "differs from the plain model")


def leaving(lab: Lab, stack: Stack) -> Finding:
    """After the method has run the model is what it was, bit for bit; and the method acts."""
    if not stack:
        same = torch.equal(lab.forward(()), lab.forward(()))
        return Finding(same, "runs repeat" if same else "two plain runs differ")
    before = lab.forward(())
    acts: bool | None = None
    if any(m.wants("search") for m in stack):  # a single pass is no part of it
        lab.produce(stack, lab.chats(stack, 1))
    else:
        during = lab.forward(stack)
        acts = during.shape != before.shape or not torch.equal(during, before)
    if not torch.equal(before, lab.forward(())):
        return Finding(False, "the plain model differs after the method")
    told = "equal to before" + "; the method changed nothing in this prompt" * (acts is False)
    return Finding(True, told, {"acts": acts})


def batch(lab: Lab, stack: Stack) -> Finding:
    """A padded batch gives what its questions give alone."""
    chats = lab.chats(stack)
    together = lab.produce(stack, chats)
    alone = [lab.produce(stack, [chat]) for chat in chats]
    return _judged(lab, stack, "batch against single", together, _stacked(alone))


def uncached(lab: Lab, stack: Stack) -> Finding:
    """A cache changes nothing: the plain model without one, a method on a shared image prefix."""
    if not stack:
        chats = lab.chats(())
        plain = lab.produce((), chats, use_cache=False)
        return _judged(lab, (), "cached against uncached", plain, lab.produce((), chats))
    chats = lab.about_one(stack)
    prompts = prepare(lab.vlm, chats, stack)
    if prompts is None:
        return Finding(None, "asks every question alone: nothing is shared")
    shared = ask_together(lab.vlm, prompts, stack, TOKENS)
    alone = [lab.vlm.answer([chat], stack, TOKENS)[0] for chat in chats]
    gap = max(
        (abs(p - q) for a, b in zip(shared, alone, strict=True)
         for s, t, p, q in zip(a.tokens, b.tokens, a.probabilities, b.probabilities, strict=False)
         if s == t), default=0.0,
    )  # fmt: skip
    parted = sum(a.tokens != b.tokens for a, b in zip(shared, alone, strict=True))
    limit = 1e-3 if lab.vlm.model.dtype == torch.float32 else 0.1
    exact = lab.vlm.model.dtype == torch.float32
    told = f"probabilities differ by {gap:.1e}, {parted} of {len(chats)} answers differ"
    return Finding(gap <= limit and not (exact and parted), told, {"gap": gap, "different": parted})


def static(lab: Lab, stack: Stack) -> Finding:
    """A static cache gives what a dynamic one gives."""
    if not compat.static_cache(lab.vlm.model):
        return Finding(None, "no static cache can be made for this model")
    chats = lab.chats(stack)
    ours = lab.produce(stack, chats, cache_implementation="static")
    return _judged(lab, stack, "static cache", lab.produce(stack, chats), ours)


def compiled(lab: Lab, stack: Stack) -> Finding:
    """Decoding on a static cache is one graph, captured by torch.compile and run eagerly."""
    if not compat.static_decoding(lab.vlm.model) or not compat.static_cache(lab.vlm.model):
        return Finding(None, "transformers does not compile this model")
    if any(m.wants("contrast") for m in stack):
        return Finding(None, "a second stream is not one static graph")
    chats = lab.chats(stack)
    torch.compiler.reset()
    try:
        how = {"cache_implementation": "static", "compile_config": compat.graphs()}
        ours = lab.produce(stack, chats, **how)
    finally:
        torch.compiler.reset()
    return _judged(lab, stack, "compiled", lab.produce(stack, chats), ours)


def precision(lab: Lab, stack: Stack) -> Finding:
    """The first layers in bfloat16 are near float32, as near as the plain model's."""
    gaps = {}
    for name in ("plain", "ours") if stack else ("plain",):
        used = stack if name == "ours" else ()
        low, high = (lab.slice[d].forward(used) for d in ("bfloat16", "float32"))
        if low.shape != high.shape:
            return Finding(None, "its picture differs between the two")
        gaps[name] = distance(high[:, -1], low[:, -1])
    gap = gaps.get("ours", gaps["plain"])
    told = f"bfloat16 differs by {gap:.1e} of the logits' spread"
    finite = math.isfinite(gap)
    return Finding(finite and gap <= max(HALF, SLACK * gaps["plain"]), told, gaps)


def cost(lab: Lab, stack: Stack) -> Finding:
    """Seconds of an answer, and on CUDA the memory of its peak, over the plain model's."""
    if not stack:
        return Finding(None, "what the others are divided by", _spent(lab, ()))
    plain, ours = _spent(lab, ()), _spent(lab, stack)
    ratios = {key: ours[key] / plain[key] for key in ours if plain.get(key)}
    told = ", ".join(f"{ratio:.2f} times the {key}" for key, ratio in ratios.items())
    return Finding(None, told, ratios)


def _spent(lab: Lab, stack: Stack) -> dict[str, float]:
    cuda = lab.device.type == "cuda"
    times = []
    lab.vlm.readings.clear()
    for number in range(REPEATED + 1):  # the first warms up
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        lab.vlm.readings.clear()
        lab.produce(stack, lab.chats(stack, 1))
        if cuda:
            torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - start)
    spent = {"seconds": statistics.median(times)}
    if cuda:
        spent["memory"] = float(torch.cuda.max_memory_allocated() - held)
    return spent


def _stacked(parts: Sequence[Produced]) -> Produced:
    made = [part.logits for part in parts if part.logits is not None]
    logits = torch.cat(made, 1) if len(made) == len(parts) else None
    return Produced(torch.cat([part.tokens for part in parts]), logits)


def _judged(lab: Lab, stack: Stack, check: str, a: Produced, b: Produced) -> Finding:
    """Two ways to one result: as near as rounding allows, for this dtype and this model."""
    gap, parted = apart(a, b)
    if not stack:
        lab.plain[check] = gap
    limit = lab.limit(lab.plain.get(check, 0.0))
    if a.logits is None:
        exact = lab.vlm.model.dtype == torch.float32
        told = f"a search: {parted} of {len(a.tokens)} answers differ"
        return Finding(not parted if exact else None, told, {"different": parted})
    told = f"logits differ by {gap:.1e} of their spread"
    told += f", {parted} of {len(a.tokens)} answers differ" * bool(parted)
    return Finding(gap <= limit, told, {"gap": gap, "limit": limit, "different": parted})


MODEL: dict[str, Callable[[Lab], Finding]] = {
    "handshake": handshaken,
    "layout": layout,
    "sinks of VAR": sinks,
    "heads of AD-HH": heads,
}
METHOD: dict[str, Callable[[Lab, Stack], Finding]] = {
    "neutral": neutral,
    "leaving": leaving,
    "batch against single": batch,
    "cached against uncached": uncached,
    "static cache": static,
    "compiled": compiled,
    "bfloat16 against float32": precision,
    "cost": cost,
}


def tried(check: Callable[[], Finding]) -> Finding:
    """What a check found; what foveate refuses is neither good nor bad, an error is bad."""
    try:
        return check()
    except FoveateError as error:
        return Finding(None, f"refused: {error}")
    except Exception as error:
        return Finding(False, f"{type(error).__name__}: {error}"[:300])
