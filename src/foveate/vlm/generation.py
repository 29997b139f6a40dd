"""The options of `generate`: greedy unless asked otherwise, and none that does nothing."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationConfig

from ..base.errors import FoveateError
from ..base.form import nearest, shown

SAMPLING = ("temperature", "top_p", "top_k")


def generation_options(
    model: Any, tokenizer: Any, max_new_tokens: int, given: dict[str, Any]
) -> dict[str, Any]:
    """What to call `model.generate` with.

    Decoding is greedy, except with ``do_sample=True``, a temperature above 0, top_p or top_k.

    Raises:
        FoveateError: an option that `generate` does not have, or two that contradict each other.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise FoveateError(
            f"max_new_tokens must be a whole number of at least 1, got {shown(max_new_tokens)}."
        )
    known = [*inspect.signature(model.generate).parameters, *GenerationConfig().to_dict()]
    for name in given:
        if name not in known:
            raise FoveateError(f"generate has no option {shown(name)}{nearest(name, known)}.")
    if given.get("num_return_sequences", 1) != 1:
        raise FoveateError("One answer per question: ask again instead of num_return_sequences.")
    options = {"max_new_tokens": max_new_tokens, **given, "do_sample": _samples(given)}
    if not options["do_sample"]:  # a checkpoint's sampling settings would only raise warnings
        options |= dict.fromkeys(SAMPLING)
    return {"pad_token_id": tokenizer.pad_token_id, **options}


def _samples(given: dict[str, Any]) -> bool:
    """Whether tokens are drawn; who gives a temperature need not say so."""
    named = [name for name in SAMPLING if given.get(name) is not None]
    cold = given.get("temperature") == 0
    samples = given.get("do_sample")
    if samples is None:
        config = given.get("generation_config")
        return bool(named and not cold) or bool(config is not None and config.do_sample)
    if samples and cold:
        raise FoveateError("A temperature of 0 is greedy decoding: leave out do_sample=True.")
    if not samples and named and not cold:
        raise FoveateError(
            f"{' and '.join(named)} would do nothing with do_sample=False: leave one of them out."
        )
    return bool(samples)
