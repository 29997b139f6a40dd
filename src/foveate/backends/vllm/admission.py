"""Requests are refused in the front end, before anything runs: an HTTP 400 with one sentence."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from ...base.errors import FoveateError
from ...base.form import permit
from ...core.method import Method
from ...core.sequence import Stack
from ..transformers.anatomy import ModelAnatomy, anatomy
from ..transformers.compat_parts import without_weights
from .asked import IMAGES, KEY, LIVES, PAIR, POSITIONS, TWIN, acting, asked, visual
from .reading import apart, asked_to_read, joined
from .second import second

# the stages that vLLM runs
_RUN = {"begin", "before", "contrast", "scores", "weights", "logits"}
_NEEDS = {  # of other stages
    "rewrite": "to read the model's attention before it answers",
    "see": "the states of the vision tower",
    "mlp": "the feed-forward layers",
    "other_embeds": "to change what its second stream embeds",
    "other_row": "to read the attention of its second stream",
    "other_hidden": "to hide tokens from every row of its second stream",
    "search": "a search of its own",
}


# decoders whose rotary embedding was held against transformers' inside vLLM
_TURNED = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text", "gemma3_text")
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ShapeAnatomy(ModelAnatomy):
    """The anatomy of a model that vLLM runs; sizes are those of its configuration."""

    def turns(self, layer: int) -> bool:
        if self.text_kind not in _TURNED:
            raise FoveateError(
                f"Keys of {self.text_kind} cannot be moved to a common position in vLLM: that was "
                "held against transformers for other decoders only. Switch unified positions off, "
                "as in clvs(unified_positions=False), or use foveate serve."
            )
        return True


class Shape:
    """A model without weights: what methods ask of one before it runs."""

    def __init__(self, config: Any) -> None:
        self.model = without_weights(config)
        self.decoder = self.model.get_decoder()
        self.anatomy = ShapeAnatomy(**fields_of(anatomy(self.model)))


def fields_of(plain: ModelAnatomy) -> dict[str, Any]:
    """What an anatomy is made of, for another kind of it."""
    return {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}


_shapes: dict[int, tuple[Any, Shape]] = {}


def shape(config: Any) -> Shape:
    """The model of a configuration; made once."""
    if id(config) not in _shapes:
        _shapes[id(config)] = config, Shape(config)  # the configuration is kept, so is its id
    return _shapes[id(config)][1]


@functools.lru_cache(1024)
def checked(text: str, model: Shape) -> Stack:
    """The methods of a text, resolved for the model.

    Raises:
        FoveateError: one of them cannot run here.
    """
    methods, readers = apart(text)
    stack = Stack(model.anatomy, (*map(fitting, acting(methods)), *readers))
    owners = [stack.methods[i].name for i in stack.at("contrast")]
    if len(owners) > 1:
        raise FoveateError(
            f"{' and '.join(owners)} each need a second stream, and there is one: leave one out."
        )
    for method in stack.methods[: -len(readers) or None]:
        acts = method.edits_attention or method.wants("logits")
        if method.wants("before") and not acts:
            raise FoveateError(f"{method.name} {_ELSEWHERE}.")
        if getattr(method, "sink_dims", ()) is None:
            raise FoveateError(
                f"The sink_dims of this model are not published, and vLLM runs no pass of its own "
                f"to find them: give them, as in {method.name}(sink_dims=(458, 2570)), or "
                f"use foveate with transformers, which finds them."
            )
    return stack


_ELSEWHERE = "does not run inside vLLM: use foveate serve, or foveate with transformers"


def fitting(method: Method, ahead: bool = False) -> Method:
    """The method itself, where vLLM can run it.

    Args:
        ahead: whether a front end has run the stage `rewrite`.

    Raises:
        FoveateError: it cannot.
    """
    permit(method)
    run = _RUN | {"rewrite"} if ahead else _RUN
    needs = [stage for stage in (*_NEEDS, *method.stages) if method.wants(stage)]
    missing = next((stage for stage in needs if stage not in run), None)
    what = None if missing is None else _NEEDS.get(missing, f"the stage {missing}")
    if missing == "rewrite" and not method.looks_again:
        what = "to change the chat before it is a prompt"
    if missing is None and method.wants("rewrite") and method.wants("contrast"):
        what = "another chat for its second stream"
    if what is not None:
        raise FoveateError(f"{method.name} needs {what}, so it {_ELSEWHERE}.")
    if method.wants("logits") and method.edits_attention and method.remembers:
        raise FoveateError(
            f"{method.name} changes the logits by what it remembers of the attention, so it "
            f"{_ELSEWHERE}."
        )
    if method.reads_prompt and not (method.remembers and method.edits_attention):
        raise FoveateError(f"{method.name} reads every row of the prompt, so it {_ELSEWHERE}.")
    return method


def check_text(params: Any) -> None:
    """Whether a request's text names methods that vLLM can run, whatever the model.

    Raises:
        FoveateError: it does not.
    """
    for method in acting(asked(params)):
        fitting(method)


def admit(config: Any, request: Any) -> Stack | None:
    """Whether a request can be answered as it asks; notes where its images lie.

    Args:
        config: the model's transformers configuration. request: an `EngineCoreRequest`.

    Returns:
        Its methods; None for the plain model.

    Raises:
        FoveateError: it cannot.
    """
    params = request.sampling_params
    if params is None:
        return None
    text, readers = asked(params), asked_to_read(params)
    if not text and not readers:
        return None
    stack = checked(joined(text, readers), shape(config))
    if request.prompt_token_ids is None:
        raise FoveateError(
            f"{text} acts on image tokens, which a prompt of embeddings does not show: send text."
        )
    images = []
    for feature in request.mm_features or ():
        if feature.modality not in ("image", "video"):
            continue
        images += _runs(feature.mm_position)
    if not images and stack.needs_image:
        raise FoveateError(
            f"The prompt has no image, so {'+'.join(stack.needs_image)} would do nothing: send an "
            f"image, or leave out {KEY}."
        )
    ours = (POSITIONS, LIVES, PAIR, TWIN)
    sent = {k: v for k, v in params.extra_args.items() if k not in ours}
    params.extra_args = sent | {IMAGES: images} | ({KEY: text} if text else {})
    if stack.owner is not None:
        ids = request.prompt_token_ids
        second(stack, config, ids, visual(params, len(ids)), request.mm_features)
    if any(method.remembers and method.edits_attention for method in stack.methods):
        # what it remembers of earlier tokens is made by computing them
        params.skip_reading_prefix_cache = True
    return stack


def _runs(place: Any) -> list[tuple[int, int]]:
    """(first column, length) of the runs of embeddings in a placeholder's range."""
    if place.is_embed is None:
        return [(place.offset, place.length)] if place.length else []
    flags = torch.nn.functional.pad(torch.as_tensor(place.is_embed).int().cpu(), (1, 1))
    edges = flags.diff().nonzero()[:, 0].tolist()
    return [
        (place.offset + start, end - start)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
