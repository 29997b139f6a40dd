"""What foveate does on one image-text-to-text type: built tiny, asked, and compared.

The prompts have placeholder tokens and no pixels, which every type embeds as it embeds text. What
methods do to the language model's rows does not depend on what stands there.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import transformers
import transformers.models.llava.modeling_llava
import transformers.models.qwen3_vl.modeling_qwen3_vl
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers import compat
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.handshake import handshake
from foveate.core.visual import visual_token_ids
from foveate.families.layout import layout_of
from foveate.methods.cli.method import SERVES
from foveate.methods.clvs import CLVS
from foveate.methods.pai import PAI
from tests.references import clvs, pai
from tests.survey.shrink import FIRST_TEXT, REPAIRED, VARIANTS, VOCAB, build, default

SECONDS, MEMORY = 60, 16 << 30  # that one type may take
STEPS = 3
NEAR = 2e-4  # logits of models with several layers of random weights
MARKS = ("gemma3", "shieldgemma2")  # whose token types tell images from text
IMAGE = 90  # where a configuration names no image token
CLVS_PLAIN = CLVS(smoothing=0.6, stop_threshold=0, unified_positions=False)
CLVS_UNIFIED = CLVS(smoothing=0.6, stop_threshold=0)
BOOST = PAI(alpha=0.5, gamma=1.0, boost_first_token=True)
GUIDED = PAI(alpha=0.5, gamma=1.2, boost_first_token=True)


def types() -> dict[str, str]:
    """Every image-text-to-text type of the installed transformers and `VARIANTS`, with classes."""
    known = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return known | {name: known[kind] for name, (kind, _) in VARIANTS.items() if kind in known}


def walk(names: Iterable[str], say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The rows of types, each from a process of its own, which may hang or eat memory."""
    return {name: _apart(name, say) for name in names}


def _apart(model_type: str, say: Callable[[str], None]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(10 * SECONDS)  # on a busy machine
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()  # of what it logs a test makes errors
            torch.set_num_threads(1)
            torch.manual_seed(0)
            row = examine(model_type)
        except BaseException as error:
            row = {"crash": _short(error)}
        os.write(writing, json.dumps(row).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    row = json.loads(said) if said else {"crash": f"no answer in {SECONDS} s"}
    say(f"{model_type}: {status(row)}")
    return row


def turned_away(row: dict[str, Any]) -> str | None:
    """Why a type that looked well is refused when it runs; None for the others."""
    found = [row.get("checks", {}).get(name, "") for name in ("rows", "boost")]
    said = next((one for one in found if one.startswith("refused: ")), None)
    return said and said.removeprefix("refused: ")


def status(row: dict[str, Any]) -> str:
    """One word for a row, or what is wrong."""
    if turned_away(row):
        return "refused when it runs"
    if "refused" in row or "unbuilt" in row or "crash" in row:
        return next(name for name in ("crash", "unbuilt", "refused") if name in row)
    wrong = [name for name, found in row["checks"].items() if found != "yes"]
    return f"accepted, but for {', '.join(wrong)}" if wrong else "accepted"


def examine(model_type: str) -> dict[str, Any]:
    """The row of a type, JSON-ready.

    "class"; "layers" (kind -> how many, of the default configuration); "layout", "cli",
    "image_token" (whether there is one); and either "unbuilt" or "refused", a reason, or "checks":
    name -> "yes", or what happened instead.
    """
    row: dict[str, Any] = {"class": types()[model_type]}
    config = default(model_type)
    try:
        kinds = compat.layer_kinds(config.get_text_config(decoder=True))
    except AttributeError:
        kinds = ()
    row["layers"] = dict(Counter(kinds))
    model, why = _built(model_type, config)
    if model is None:
        return row | {"unbuilt": why}
    image = visual_token_ids(model.config)
    row |= {
        "layout": layout_of(config) is not None,
        "cli": config.model_type in SERVES,
        "image_token": bool(image),
    }
    try:
        handshake(model)
        with enhance(model, CLVS_PLAIN, image_token_id=named_nowhere(model)):
            pass
    except FoveateError as error:
        return row | {"refused": str(error)}
    if why is not None:
        return row | {"unbuilt": why}
    if model_type in REPAIRED:
        row["repaired"] = REPAIRED[model_type]
    randomise(model)
    row["checks"] = dict(_checks(model, image[0] if image else IMAGE))
    return row


def _built(model_type: str, config: Any) -> tuple[Any, str | None]:
    """The tiny model, or the outline of the default one and why; or nothing and why."""
    try:
        return build(model_type), None
    except Exception as error:
        why = _short(error)
    try:
        with torch.device("meta"):
            return transformers.AutoModelForImageTextToText.from_config(config), why
    except Exception as error:
        return None, _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def randomise(model: Any) -> None:
    """Seeded weights for the language model, so wide that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    parts = [compat.decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = {
        id(m.weight) for part in parts for m in part.modules() if isinstance(m, nn.Embedding)
    }
    done = set()
    for part in parts:
        for name, p in part.named_parameters():
            if id(p) in done:
                continue
            done.add(id(p))
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() < 2:
                p.data = 0.1 * noise + (1.0 if "norm" in name else 0.0)
            elif id(p) in embeddings:
                p.data = noise
            else:
                p.data = noise / p[0].numel() ** 0.5
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False


def prompt(model: Any, image: int, row: int = 0, batch: int = 1) -> dict[str, Tensor]:
    """Text, eight placeholders, text; left-padded."""
    rows = []
    for i in range(row, row + batch):
        draw = torch.Generator().manual_seed(i)
        text = torch.randint(FIRST_TEXT, VOCAB, (12,), generator=draw).tolist()
        rows.append([1, *text[: 2 + i], *[image] * 8, *text[6 : 11 - 2 * i]])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    pads = torch.tensor([[width - len(r)] for r in rows])
    given = {"input_ids": ids, "attention_mask": (torch.arange(width)[None] >= pads).long()}
    if "token_type_ids" in inspect.signature(type(model).forward).parameters:
        marked = model.config.model_type in MARKS
        given["token_type_ids"] = (ids == image).long() * marked
    return given


def generate(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, **options}
    with torch.no_grad(), enhance(model, *stack, image_token_id=named_nowhere(model)):
        return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def named_nowhere(model: Any) -> int | None:
    """The placeholder, for `enhance`, where the configuration names none."""
    return None if visual_token_ids(model.config) else IMAGE


CHECKS = {
    "rows": "the last row is edited and no other, and leaving restores the model",
    "boost": "PAI's boost equals its reference on full attention maps",
    "smoothing": "CLVS without unified positions does",
    "unified": "CLVS with them does",
    "batch": "a padded batch equals single runs",
    "stream": "PAI's guidance, a second stream, equals whole runs by hand",
    "static": "a static cache equals a dynamic one",
    "prefix": "a forked prefix and the rest equal the whole prompt",
}


def _checks(model: Any, image: int) -> Iterator[tuple[str, str]]:
    """Names of `CHECKS`, and "yes", or what happened instead."""
    inputs = prompt(model, image)

    def forward(*stack: Any) -> Tensor:
        with torch.no_grad(), enhance(model, *stack, image_token_id=named_nowhere(model)):
            return model(**inputs, use_cache=True).logits

    def rows() -> bool:
        plain, edited = forward(), forward(BOOST)
        again = forward()
        assert plain.isfinite().all(), "the plain model gives no finite logits"
        assert torch.equal(plain, again), "leaving does not restore the model"
        if not compat.reads_both_ways(model):
            assert torch.equal(plain[:, :-1], edited[:, :-1]), "other rows changed"
        return not torch.equal(plain[:, -1], edited[:, -1])

    def against(method: Any, reference: Any) -> bool:
        out = generate(model, inputs, method)
        tokens = out.sequences[:, inputs["input_ids"].shape[1] : -1]
        slow = reference.run(inputs, STEPS, tokens=tokens)
        return all(near(a, b.logits) for a, b in zip(out.logits, slow, strict=True))

    def boost() -> bool:
        found = BOOST.resolve(anatomy(model)).parameters()
        return against(BOOST, _shown(pai.PAI, image)(model, **found))

    def smoothing() -> bool:
        return against(CLVS_PLAIN, _reference(model, image, CLVS_PLAIN))

    def unified() -> bool:
        return against(CLVS_UNIFIED, _reference(model, image, CLVS_UNIFIED))

    def batch() -> bool:
        whole = torch.stack(generate(model, prompt(model, image, batch=2), CLVS_PLAIN).logits)
        alone = [
            torch.stack(generate(model, prompt(model, image, r), CLVS_PLAIN).logits) for r in (0, 1)
        ]
        return all(near(whole[:, r], alone[r][:, 0]) for r in (0, 1))

    def stream() -> bool:
        found = GUIDED.resolve(anatomy(model)).parameters()
        return against(GUIDED, _shown(pai.PAI, image)(model, **found))

    def static() -> bool:
        a, b = (
            torch.stack(generate(model, inputs, CLVS_PLAIN, **options).logits)
            for options in ({}, {"cache_implementation": "static"})
        )
        return near(a, b)

    def prefix() -> bool:
        cut = int((inputs["input_ids"][0] == image).nonzero()[-1]) + 1
        head = {k: v[:, :cut] for k, v in inputs.items()}
        tail = {"input_ids": inputs["input_ids"][:, cut:]}
        with torch.no_grad(), enhance(model, CLVS_PLAIN, image_token_id=named_nowhere(model)):
            fork = copy.deepcopy(prefill(model, head))
            tail["attention_mask"] = inputs["attention_mask"]
            places = torch.arange(cut, inputs["input_ids"].shape[1])[None]
            out = model(**tail, position_ids=places, **compat.passing(model, fork))
        return near(out.logits[:, -1], forward(CLVS_PLAIN)[:, -1])

    checks = (rows, boost, smoothing, unified, batch, stream, static, prefix)
    for check in checks:
        yield check.__name__, _outcome(check)


def _outcome(check: Callable[[], bool]) -> str:
    try:
        return "yes" if check() else "no"
    except FoveateError as error:
        return f"refused: {error}"
    except Exception as error:
        return _short(error)


def near(a: Tensor, b: Tensor) -> bool:
    return bool(torch.where(a == b, 0, (a - b).abs()).max() < NEAR)


def _shown(reference: type, token: int) -> Any:
    """A reference that takes placeholders without pixels for an image."""
    return type(reference.__name__, (reference,), {"blind": False, "image_token": token})


def _reference(model: Any, image: int, method: CLVS) -> Any:
    found = method.resolve(anatomy(model)).parameters()
    return _shown(clvs.Reference, image)(model, clvs.Parameters(**found))
