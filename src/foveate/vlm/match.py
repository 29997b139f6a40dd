"""Second models that say how well a picture and a question match, and where the match lies.

A matcher is any callable ``(picture, question) -> (map, score)``: a float array (rows, cols) over
the whole picture, and a similarity in -1..1. Two are here by name, and are loaded from the hub when
somebody asks for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from ..base.errors import FoveateError

Matcher = Callable[[Image.Image, str], tuple[np.ndarray, float]]

_ENC = 30523  # BLIP's mark in place of [CLS], the last word of the released vocabulary


@functools.lru_cache(2)
def matcher(name: str, device: torch.device) -> Matcher:
    """The matcher `name`, "siglip" or "blip-itm", on a device; kept for the next call.

    Raises:
        FoveateError: it cannot be loaded.
    """
    hub, kind, model_class = {
        "siglip": ("google/siglip-base-patch16-384", SiglipMatcher, "SiglipModel"),
        "blip-itm": ("Salesforce/blip-itm-large-coco", BlipMatcher, "BlipForImageTextRetrieval"),
    }[name]
    try:
        model = getattr(transformers, model_class).from_pretrained(hub)
        processor = transformers.AutoProcessor.from_pretrained(hub)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise FoveateError(
            f"The matcher {name!r} ({hub}) cannot be loaded: {reason}. Without a matcher, the "
            "model's own attention takes its place."
        ) from error
    return kind(model.to(device).eval(), processor.image_processor, processor.tokenizer)


class SiglipMatcher:
    """SigLIP: what each patch adds to the cosine of picture and question.

    The map is relu(state x gradient), summed over the width of the states that enter the pooling
    head. The score is the cosine.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any) -> None:
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer

    def __call__(self, image: Image.Image, question: str) -> tuple[np.ndarray, float]:
        model = self.model
        length = model.config.text_config.max_position_embeddings
        text = self.tokenizer(
            question, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            words = model.text_model(input_ids=text["input_ids"].to(model.device)).pooler_output
            states = model.vision_model(pixel_values=pixels.to(model.device)).last_hidden_state
        with torch.enable_grad():
            states = states.requires_grad_()
            seen = model.vision_model.head(states)
            cosine = torch.cosine_similarity(seen, words).sum()
            (gradient,) = torch.autograd.grad(cosine, states)
        return _square((states * gradient).sum(-1).relu()[0]), cosine.item()


class BlipMatcher:
    """BLIP's image-text matching, as AGLA uses it: GradCAM of the answer "they match".

    The map is attention x relu(its gradient) in the cross-attention of one text layer, without the
    picture's class token, mean over the heads and over the question's tokens. The score is the
    cosine of the contrastive embeddings.

    Args:
        layer: 0-based, of the text encoder. Published: 6.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, layer: int = 6) -> None:
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.layer = layer

    def __call__(self, image: Image.Image, question: str) -> tuple[np.ndarray, float]:
        model, encoder = self.model, self.model.text_encoder
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        length = model.config.text_config.max_position_embeddings
        text = self.tokenizer(question, truncation=True, max_length=length, return_tensors="pt")
        ids, mask = (text[k].to(model.device) for k in ("input_ids", "attention_mask"))
        with torch.no_grad():
            seen = model.vision_model(pixel_values=pixels.to(model.device)).last_hidden_state
            words = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            pair = model.vision_proj(seen[:, 0]), model.text_proj(words[:, 0])
            cosine = torch.cosine_similarity(*pair).item()
        if model.config.text_config.vocab_size > _ENC:
            ids = ids.clone()
            ids[:, 0] = _ENC
        attention: list[Tensor] = []
        cross = encoder.encoder.layer[self.layer].crossattention.self
        handle = cross.dropout.register_forward_hook(lambda *call: attention.append(call[-1]))
        try:
            with torch.enable_grad():
                words = encoder(
                    input_ids=ids,
                    attention_mask=mask,
                    encoder_hidden_states=seen.requires_grad_(),
                    encoder_attention_mask=torch.ones_like(seen[..., 0]),
                ).last_hidden_state
                match = model.itm_head(words[:, 0])[:, 1].sum()
                (gradient,) = torch.autograd.grad(match, attention[0])
        finally:
            handle.remove()
        relevance = (attention[0].detach() * gradient.relu())[0, :, 1:-1, 1:]
        return _square(relevance.mean((0, 1))), cosine


def _square(values: Tensor) -> np.ndarray:
    """(N,) patches of a square picture, line by line, as (rows, cols) float64."""
    side = math.isqrt(len(values))
    return values.detach().double().reshape(side, side).cpu().numpy()
