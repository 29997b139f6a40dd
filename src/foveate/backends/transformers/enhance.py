"""The door: `enhance` switches methods on inside a ``with`` block and restores the model after it.

The language model is switched to a registered attention function, and hooks pass a context to it.
What a sequence needs lives on its KV cache as ``cache.foveate``, so batches, parallel streams,
several turns, static caches and compiled decoding need no care.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import FoveateError
from ...base.interrupts import interruptible, whole
from ...core.method import Method, as_stack
from ...core.sequence import Stack
from ...core.visual import visual_mask, visual_token_ids
from . import compat, compat_cache
from .anatomy import anatomy
from .attention import register, release
from .handshake import check_feed_forwards, check_layers, handshake
from .heartbeat import check_graphs, forget_unfinished, lost
from .hooks import Hooks
from .pictures import stackable
from .search import search_arguments

_enhanced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


@whole
def enhance(model: Any, *methods: Method | str, image_token_id: int | None = None) -> Iterator[Any]:
    """Apply methods to a vision-language model inside a ``with`` block.

    ``with enhance(model, "clvs"): model.generate(**inputs)``

    Several methods act in the order given. Leaving the block restores the model exactly, also
    after an exception; Ctrl-C waits until that is done. Methods whose parameters are neutral
    install nothing.

    Args:
        model: any Hugging Face vision-language model with a ``generate``.
        methods: text forms such as ``"clvs(smoothing=0.7)+vcd"``, or `Method` instances.
        image_token_id: id of the image placeholder, where the model's configuration names none.

    Raises:
        FoveateError: if the model or the combination of methods cannot be served.
    """
    stack = as_stack(*methods)
    for method in stack:
        if method.wants("rewrite"):
            raise FoveateError(
                f"{method.name} changes the prompt before the model sees it, which needs the "
                "processor: use VLM.load(...).ask(image, question, method=...)."
            )
    with attach(model, stack, image_token_id):
        yield model


@whole
def attach(
    model: Any,
    methods: tuple[Method, ...],
    image_token_id: int | None = None,
    notes: list[dict[str, Any]] | None = None,
    contrast: dict[str, Tensor] | None = None,
    plans: dict[str, Any] | None = None,
) -> Iterator[None]:
    """`enhance` for methods whose `rewrite`, if any, has been run by the caller.

    Args:
        notes: one per prompt, for `Sequences.notes`.
        contrast: for `Prompt.given`, as the processor returns them: the prompts' pixels for a
            second stream, or its token ids with their mask and types; only with notes.
        plans: method name -> what its `setup` would return, such as a module in training.
    """
    model = compat.unwrapped(model)
    methods = tuple(m for m in methods if not m.is_neutral)
    if not methods:
        yield
        return
    decoder, stack, image_ids = _prepared(model, methods, image_token_id, plans)
    with _lock:
        if decoder in _enhanced:
            raise FoveateError(
                "This model is already inside an enhance() block: leave it first, or pass all "
                "methods at once, as in enhance(model, 'clvs', 'vcd')."
            )
        _enhanced.add(decoder)
    with ExitStack() as leaving:  # whatever fails, every step is undone
        leaving.callback(_enhanced.discard, decoder)
        usual = compat.attention_name(decoder)
        leaving.callback(compat.set_attention_name, decoder, usual)
        name = register(stack.identity, usual)
        leaving.callback(release, name)
        hooks = Hooks(model, name, stack, image_ids, notes or [], contrast)
        compat.set_attention_name(decoder, name)
        if compat.attention_name(decoder) != name or not compat.is_registered(name):
            raise lost(model, "it does not take an attention function and its masks by name")
        for handle in hooks.install():
            leaving.callback(handle.remove)
        leaving.callback(hooks.streams.recover)
        if getattr(model, "generate", None) is not None:
            guarded = _guarded(model.generate, hooks, flash=usual.startswith("flash"))
            leaving.enter_context(compat.replaced(model, "generate", guarded))
        needs_pixels = any(method.needs_pixels for method in stack.methods)
        if stack.vision or stack.at("tower") or needs_pixels:
            expanding = functools.partial(_expanding, visual=hooks.visual)
            leaving.enter_context(compat.pixels_to_the_forward(model, expanding))
        try:
            yield
        except BaseException:
            forget_unfinished(name, stack)
            raise
        check_graphs(name, model, stack)


@interruptible
def _prepared(
    model: Any,
    methods: tuple[Method, ...],
    image_token_id: int | None,
    plans: dict[str, Any] | None,
) -> tuple[Any, Stack, tuple[int, ...]]:
    """What a block needs, before anything is changed; a method's `setup` may fetch files."""
    decoder = handshake(model).decoder
    stack = Stack(anatomy(model), methods, plans)
    check_layers(model, stack.edited)
    check_feed_forwards(model, stack.fed)
    image_ids = visual_token_ids(model.config, image_token_id)
    if not image_ids and stack.needs_image:
        visual_mask((), torch.zeros(1, 1, dtype=torch.long))  # says what to do
    return decoder, stack, image_ids


def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    """Fill a cache with a prefix (system text and images) that several questions will share.

    Inside `enhance` the prefix is marked as such: no last-row edit, no step of methods that
    accumulate over tokens. Fork the result with ``copy.deepcopy`` and ``batch_repeat_interleave``.

    Args:
        inputs: what the processor returned for the prefix.

    Returns:
        A dynamic cache that holds the prefix.
    """
    if compat.reads_both_ways(model):
        raise FoveateError(
            f"{type(model).__name__} reads a prompt in both directions, so what stands before the "
            "question depends on it and cannot be shared: ask every question with its image."
        )
    cache = compat_cache.empty_cache(compat.decoder_of(model))
    enhanced = compat.decoder_of(model) in _enhanced
    marked = {"foveate": "prefix"} if enhanced else {}
    with torch.no_grad():
        given = inputs | compat.passing(model, cache) | marked
        model(**given, use_cache=True, logits_to_keep=1)
    return cache


def _guarded(generate: Callable[..., Any], hooks: Hooks, flash: bool) -> Callable[..., Any]:
    """`generate`, refusing up front the modes that would edit the wrong rows.

    A method that searches takes its place.
    """

    @functools.wraps(generate)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config")

        def option(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        if option("prefill_chunk_size") is not None:
            raise FoveateError(
                "A prompt filled in chunks has no last row to edit until its end: "
                "leave out prefill_chunk_size."
            )
        if kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            raise FoveateError(
                "Assisted decoding checks several tokens at once and crops the cache, which edited "
                "rows do not survive: generate without an assistant."
            )
        hooks.check_thread()
        if hooks.stack.at("search"):
            kwargs = search_arguments(hooks.stack, flash, kwargs)
        hooks.generating, hooks.had_image = True, False
        try:
            return generate(*args, **kwargs)
        finally:
            hooks.generating = False

    return guarded


def _expanding(expand: Callable[..., Any], visual: Callable[..., Tensor]) -> Callable[..., Any]:
    """How `generate` repeats inputs for beams; pictures are repeated with their prompts."""

    @functools.wraps(expand)
    def expanded(expand_size: int = 1, **kwargs: Any) -> Any:
        tensors = {
            k: v
            for k, v in kwargs.items()
            if isinstance(v, Tensor) and k not in ("input_ids", "position_ids")
        }
        ids = kwargs.get("input_ids")
        if expand_size == 1 or ids is None:
            return expand(expand_size=expand_size, **kwargs)
        if not stackable(tensors):
            raise FoveateError(
                "Beam search with a method that needs the pixels repeats them, and this model "
                "keeps those of all pictures in one: leave out num_beams and num_return_sequences."
            )
        if len(ids) == 1:  # everything belongs to the one prompt
            rest = {k: v for k, v in kwargs.items() if k not in tensors}
            ids, rest = expand(expand_size=expand_size, **rest)
            return ids, rest | {k: torch.cat([v] * expand_size) for k, v in tensors.items()}
        one_each = bool(visual(kwargs).any(1).all())
        if any(len(v) != len(ids) for v in tensors.values()) or not one_each:
            raise FoveateError(
                "Beam search with a method that needs the pixels takes one picture per prompt, "
                "stored in one row: ask one prompt at a time."
            )
        return expand(expand_size=expand_size, **kwargs)

    return expanded
