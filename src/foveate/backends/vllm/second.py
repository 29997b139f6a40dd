"""What a second stream reads: the prompt of a request, as the owner of the stream changes it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import FoveateError
from ...core.method import Method
from ...core.prompt import Prompt
from ...core.sequence import Stack, State
from ..transformers.pictures import pictures

_NOWHERE = "so it does not run inside vLLM: use foveate serve, or foveate with transformers."


@dataclass(frozen=True)
class Second:
    """What the twin of a request reads.

    Attributes:
        ids: its prompt. features: `MultiModalFeatureSpec` of its pictures.
        ahead: whether it is read before the request's answer begins, and says nothing more.
    """

    ids: list[int]
    features: list[Any]
    ahead: bool


def second(stack: Stack, config: Any, ids: list[int], visual: Tensor, features: Any) -> Second:
    """The second stream's prompt.

    Args:
        stack: has an owner. config: the model's transformers configuration.
        visual: (N,) bool, of `ids`. features: of the request's pictures. Where a front end has sent
            the pixels to the engine before, it has none, and none are changed.

    Raises:
        FoveateError: its owner needs what vLLM cannot give it.
    """
    assert stack.owner is not None
    owner, pixels = stack.methods[stack.owner], _pixels(features)
    if owner.needs_pixels and getattr(config, "model_type", "llava") != "llava":
        raise FoveateError(
            f"{owner.name} changes pixels, and in vLLM that is held against transformers for "
            f"LLaVA-1.5 alone, not for {config.model_type}: use foveate serve, or a method such as "
            "m3id."
        )
    mask = torch.ones(1, len(ids), dtype=torch.long)
    split = functools.partial(_pictures, config, features)
    tokens = torch.tensor([ids])
    # a front end without pixels still asks for the text
    shown = {name: elem.data for name, elem in pixels.items()} or {"": torch.zeros(0)}
    prompt = Prompt(mask, visual[None], tokens, None, shown, None, split, {})
    changed = owner.contrast(prompt, State(stack, visual[None], "prompt").seen_by(stack.owner))
    refuse(owner, changed)
    assert isinstance(changed, Prompt)
    assert changed.ids is not None
    if not bool(changed.visual.any()):
        return Second(changed.ids[0].tolist(), [], changed.ahead)
    end = int(visual.nonzero()[-1]) + 1
    if not torch.equal(changed.visual[0, :end], visual[:end]):
        raise FoveateError(f"{owner.name} moves the pictures in its second stream, {_NOWHERE}")
    new = [
        _repainted(feature, number, pixels, changed.pixels, owner)
        for number, feature in enumerate(features)
    ]
    return Second(changed.ids[0].tolist(), new, changed.ahead)


def refuse(owner: Method, changed: Any) -> None:
    """Refuse a second stream that is not a prompt beside the prompt.

    Raises:
        FoveateError: with the reason.
    """
    if changed is None:
        raise FoveateError(
            f"{owner} changes nothing in this prompt for its second stream, and would be the plain "
            "model: give it what it needs, or leave it out."
        )
    if isinstance(changed, tuple) or changed.states:
        raise FoveateError(f"{owner.name} needs passes before the answer, {_NOWHERE}")
    if changed.after:
        raise FoveateError(
            f"{owner.name} changes its second stream by what the model finds in the prompt, "
            f"{_NOWHERE}"
        )


def _pixels(features: Any) -> dict[str, Any]:
    """The fields of pixels of every picture, by its number and the field's name."""
    return {
        f"{number} {name}": elem
        for number, feature in enumerate(features)
        if feature.data is not None
        for name, elem in feature.data.items()
        if name.startswith("pixel_values")
        and isinstance(elem.data, Tensor)
        and elem.data.is_floating_point()
    }


def _pictures(config: Any, features: Any, pixels: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """The pictures of a request, each a list of its tiles; see `core.prompt.Pictures`.

    vLLM holds the pixels of one picture at a time, without the dimension of pictures.
    """
    for name, value in pixels.items():
        if not name:
            continue
        number, _, field = name.partition(" ")
        feature = features[int(number)]
        inputs = {
            key: torch.as_tensor(elem.data)[None]
            for key, elem in feature.data.items()
            if key in ("image_grid_thw", "video_grid_thw", "image_sizes")
        }
        tiled = value.dim() == 4 and "image_sizes" in inputs
        flat = value.dim() == 4 or (value.dim() == 2 and bool(inputs))
        visual = torch.ones(1, feature.mm_position.get_num_embeds(), dtype=torch.bool)
        many = value[None] if tiled or not flat else value
        yield from pictures(config, inputs, visual, {field: many})


def _repainted(
    feature: Any, number: int, old: dict[str, Any], new: dict[str, Tensor], owner: Method
) -> Any:
    """A picture with its new pixels; itself where they are the same."""
    changed = {
        name.partition(" ")[2]: dataclasses.replace(elem, data=new[name])
        for name, elem in old.items()
        if name.startswith(f"{number} ") and new[name] is not elem.data
    }
    if not changed:
        return feature
    # what vLLM keeps of a picture, it keeps by its name
    mark = hashlib.sha256(str(owner).encode()).hexdigest()[:16]
    name = f"{feature.identifier}-foveate-{mark}"
    data = type(feature.data)({**feature.data, **changed})
    return dataclasses.replace(feature, data=data, identifier=name, mm_hash=name)
