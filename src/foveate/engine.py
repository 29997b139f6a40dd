"""The engine: a few hooks around a vision-language model, and nothing kept on its modules.

`enhance` switches the language model to a registered attention function and installs hooks on the
top model, the decoder and, where a method asks for it, the decoder layers. What a sequence needs
lives on its KV cache as ``cache.foveate`` and travels to the attention function as a keyword
argument, so batches, parallel streams, several turns, static caches and compiled decoding need no
care.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from .attention import register
from .context import Context, Stack, Stream, adopt, length
from .method import FoveateError, Method, as_stack
from .vision import visual_mask, visual_token_ids

_NOT_INPUTS = {
    "foveate",
    "past_key_values",
    "logits_to_keep",
    "use_cache",
    "return_dict",
    "labels",
    "output_attentions",
    "output_hidden_states",
}
_enhanced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


class _Engine:
    """The hooks of one `enhance` block."""

    def __init__(self, stack: Stack, image_ids: tuple[int, ...]) -> None:
        self.stack, self.image_ids = stack, image_ids
        self.plain = Stack(stack.model, ())
        self.befores, self.owner = stack.at("before"), next(iter(stack.at("contrast")), None)

    def install(self) -> Iterator[Any]:
        """Register every hook; yields the handles."""
        model, decoder = self.stack.model, self.stack.decoder
        yield model.register_forward_pre_hook(self.open, with_kwargs=True)
        yield model.register_forward_hook(self.close, with_kwargs=True)
        yield decoder.register_forward_pre_hook(self.locate, with_kwargs=True)
        if self.befores:
            for i, layer in enumerate(decoder.layers):
                hook = functools.partial(self.enter, i)
                yield layer.register_forward_pre_hook(hook, with_kwargs=True)
            yield decoder.layers[-1].register_forward_hook(self.leave, with_kwargs=True)

    def open(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the top model's forward: find or make the context and pass it on."""
        if "foveate" in kwargs:
            return args, kwargs
        if args:
            kwargs = dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
        cache = kwargs.get("past_key_values")
        ctx: Context | None = getattr(cache, "foveate", None)
        ids = kwargs.get("input_ids")
        new = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        if ctx is None:
            ctx = self.start(kwargs, cache)
        elif ctx.stack is not self.stack and str(ctx.stack) != str(self.stack):
            raise FoveateError(
                f"This cache was filled with {ctx.stack} and now {self.stack} is active: "
                "start from a fresh cache."
            )
        else:
            ctx.stack = self.stack
            if new == 1 and ctx.phase == "decode":
                ctx.renew()
            else:
                self.extend(ctx, kwargs, cache)
        return (), kwargs | {"foveate": ctx}

    def start(self, kwargs: dict[str, Any], cache: Any, phase: str = "prompt") -> Context:
        """The context of a new prompt."""
        if isinstance(cache, QuantizedCache):
            raise FoveateError(
                "A quantised cache returns changed keys, so attention rows would not be exact: "
                "use the default cache."
            )
        if length(cache) > 0:
            raise FoveateError(
                "This cache was filled outside enhance(), where its visual tokens were not noted: "
                "fill it inside, with foveate.prefill() or by the first call."
            )
        self.refuse_right_padding(kwargs)
        ctx = Context(self.stack, self.visual(kwargs), phase)
        if cache is not None:
            adopt(cache, ctx)
        self.warn(ctx)
        return ctx

    def extend(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> None:
        """More prompt on a filled cache: another turn, or the question after a prefix."""
        self.refuse_right_padding(kwargs)
        new, gap = self.visual(kwargs), length(cache) - ctx.visual.shape[1]
        if gap < 0:
            raise FoveateError("This cache is shorter than its prompt: start from a fresh cache.")
        if gap:
            steps = torch.arange(1, gap + 1, device=ctx.positions.device)
            ctx.positions = torch.cat([ctx.positions, ctx.positions[:, :, -1:] + steps], 2)
        ctx.phase = "prompt"
        ctx.see(torch.cat([pad(ctx.visual, (0, gap)), new.to(ctx.visual.device)], 1), new.shape[1])
        self.warn(ctx)

    def visual(self, kwargs: dict[str, Any]) -> Tensor:
        ids = kwargs.get("input_ids")
        if not self.image_ids and kwargs.get("mm_token_type_ids") is None and ids is not None:
            return torch.zeros_like(ids, dtype=torch.bool)  # allowed: no method needs an image
        return visual_mask(self.image_ids, ids, kwargs.get("mm_token_type_ids"))

    def refuse_right_padding(self, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if not (self.stack.last_rows and isinstance(mask, Tensor) and mask.dim() == 2):
            return
        if not bool(mask[:, -1].all()):
            raise FoveateError(
                "The batch is padded on the right, where the last row is no token: "
                "set processor.tokenizer.padding_side = 'left'."
            )

    def warn(self, ctx: Context) -> None:
        if ctx.empty and ctx.phase == "prompt" and self.stack.needs_image:
            warnings.warn(
                f"The prompt has no image, so {'+'.join(self.stack.needs_image)} does nothing.",
                stacklevel=2,
            )

    def locate(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the decoder: note the final positions of the prompt."""
        ctx: Context | None = kwargs.get("foveate")
        if ctx is None or ctx.phase == "decode":
            return
        embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        batch, new = (kwargs["input_ids"] if embeds is None else embeds).shape[:2]
        past = ctx.positions.shape[2]
        if positions is None:
            positions = torch.arange(past, past + new, device=ctx.visual.device)[None]
        if positions.dim() == 2:
            positions = positions[None]
        positions = positions[-3:].expand(-1, batch, -1)  # Qwen may put text positions in front
        if past:
            positions = positions.expand(len(ctx.positions), -1, -1)
            positions = torch.cat([ctx.positions, positions.to(ctx.positions.device)], 2)
        ctx.positions = positions

    def enter(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before decoder layer `layer`."""
        ctx: Context | None = kwargs.get("foveate")
        if ctx is None or not ctx.stack.methods:
            return None
        if args:
            return (self.before(args[0], ctx, layer), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.before(kwargs["hidden_states"], ctx, layer)}

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the last decoder layer: the input of the final norm."""
        ctx: Context | None = kwargs.get("foveate")
        if ctx is None or not ctx.stack.methods:
            return out
        if isinstance(out, tuple):
            return (self.before(out[0], ctx, self.stack.depth), *out[1:])
        return self.before(out, ctx, self.stack.depth)

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        for i in self.befores:
            if ctx.acts(i):
                hidden = ctx.keep(i, ctx.use(i).before(hidden, ctx, layer), hidden)
        return hidden

    def close(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the top model's forward: attach the context, contrast, edit the last logits."""
        ctx: Context | None = kwargs.get("foveate")
        if ctx is None or not ctx.stack.methods:
            return out
        cache = getattr(out, "past_key_values", None)
        if cache is not None and getattr(cache, "foveate", None) is None:
            adopt(cache, ctx)
        other = None
        if self.owner is not None and ctx.acts(self.owner):
            other = self.contrast(model, ctx, kwargs, cache)
        if ctx.phase == "prefix":
            return out
        editors = [i for i in self.stack.at("logits") if ctx.acts(i)]
        if editors:
            last = old = out.logits[:, -1]
            for i in editors:
                edited = ctx.use(i).logits(last, other if i == self.owner else None, ctx)
                last = ctx.keep(i, edited, last)
            if last is not old:
                out.logits = torch.cat([out.logits[:, :-1], last[:, None].to(old.dtype)], 1)
        ctx.phase = "decode"
        return out

    def contrast(
        self, model: Any, ctx: Context, kwargs: dict[str, Any], cache: Any
    ) -> Tensor | None:
        """Run the second stream beside this forward; its next-token logits (B, V), or None."""
        stream, owner = ctx.other, cast(int, self.owner)
        inputs = {k: v for k, v in kwargs.items() if k not in _NOT_INPUTS and v is not None}
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if stream is None:
            if ctx.phase == "decode":
                return None  # the method wanted none for this prompt
            changed = ctx.use(owner).contrast(inputs, ctx)
            if changed is None:
                return None
            mask = changed.get("attention_mask")
            visual = self.visual(changed)
            plain = Context(self.plain, visual, "prompt")
            fresh = DynamicCache(config=self.stack.decoder.config) if cache is not None else None
            stream = Stream(fresh, mask, plain)
            if cache is not None:
                ctx.other = stream
            mrope = ctx.positions.shape[0] == 3  # the model works these positions out by itself
            if "position_ids" not in changed and mask is not None and not mrope:
                changed["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            changed = inputs
            ids = inputs["input_ids"]
            if any(k.startswith("pixel_values") for k in inputs):
                changed = ctx.use(owner).contrast(inputs, ctx) or inputs
                ids = changed["input_ids"]
            tail = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].long()
            noted = stream.ctx.positions
            if stream.mask is None and mask is not None:
                stream.mask = tail.new_ones(len(ids), noted.shape[2])
            if stream.mask is not None:
                stream.mask = torch.cat([stream.mask, tail.to(stream.mask.dtype)], 1)
            positions = noted[:, :, -1:] + tail.cumsum(1).clamp(min=1)
            changed = {
                **changed,
                "attention_mask": stream.mask,
                "position_ids": positions if positions.shape[0] == 3 else positions[0],
            }
            stream.ctx.phase = "prompt"  # so that `locate` notes the positions
        core: Any = getattr(model, "model", None)
        deltas = getattr(core, "rope_deltas", None)
        try:
            out = model(
                **changed,
                past_key_values=stream.cache,
                use_cache=stream.cache is not None,
                logits_to_keep=1,
                foveate=stream.ctx,
            )
        finally:
            if hasattr(core, "rope_deltas"):
                core.rope_deltas = deltas
        return out.logits[:, -1]


# -- the door --------------------------------------------------------------------------------------


@contextmanager
def enhance(
    model: PreTrainedModel, *methods: Method | str, image_token_id: int | None = None
) -> Iterator[PreTrainedModel]:
    """Apply methods to a vision-language model inside a ``with`` block.

    ``with enhance(model, "clvs"): model.generate(**inputs)``

    Several methods act in the order given. Leaving the block restores the model exactly, also
    after an exception. Methods whose parameters are neutral install nothing.

    Args:
        model: any Hugging Face vision-language model with a ``generate``.
        methods: text forms such as ``"clvs(smoothing=0.7)+vcd"``, or `Method` instances.
        image_token_id: id of the image placeholder, where the model's configuration names none.

    Raises:
        FoveateError: if the model or the combination of methods cannot be served.
    """
    stack = as_stack(*methods)
    for method in stack:
        if "rewrite" in method.stages:
            raise FoveateError(
                f"{method.name} changes the picture before the model sees it, which needs the "
                "processor: use VLM.load(...).ask(image, question, method=...)."
            )
    with attach(model, stack, image_token_id):
        yield model


@contextmanager
def attach(
    model: PreTrainedModel, methods: tuple[Method, ...], image_token_id: int | None = None
) -> Iterator[None]:
    """`enhance` for methods whose `rewrite`, if any, has been run by the caller."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    methods = tuple(m for m in methods if not m.is_neutral)
    if not methods:
        yield
        return
    decoder = _checked_decoder(model)
    stack = Stack(model, methods)
    image_ids = visual_token_ids(model.config, image_token_id)
    if not image_ids and stack.needs_image:
        visual_mask((), torch.zeros(1, 1, dtype=torch.long))  # says what to do
    with _lock:
        if decoder in _enhanced:
            raise FoveateError(
                "This model is already inside an enhance() block: leave it first, or pass all "
                "methods at once, as in enhance(model, 'clvs', 'vcd')."
            )
        _enhanced.add(decoder)
    engine, handles = _Engine(stack, image_ids), []
    before = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation(register(str(stack), before))
        for handle in engine.install():
            handles.append(handle)
        generate: Any = getattr(model, "generate", None)
        if generate is not None:
            model.generate = _guarded(generate)  # type: ignore[assignment]
        if engine.owner is not None:  # generate() would encode the pixels before the forward
            model._supports_mm_encoder_outputs = lambda: False  # type: ignore[assignment]
        yield
    finally:
        model.__dict__.pop("generate", None)
        model.__dict__.pop("_supports_mm_encoder_outputs", None)
        for handle in handles:
            handle.remove()
        decoder.set_attn_implementation(before)
        _enhanced.discard(decoder)


def prefill(model: PreTrainedModel, inputs: dict[str, Any]) -> Cache:
    """Fill a cache with a prefix (system text and images) that several questions will share.

    Inside `enhance` the prefix is marked as such: no last-row edit, no step of methods that
    accumulate over tokens. Fork the result with ``copy.deepcopy`` and ``batch_repeat_interleave``.

    Args:
        inputs: what the processor returned for the prefix.

    Returns:
        A dynamic cache that holds the prefix.
    """
    cache = DynamicCache(config=model.get_decoder().config)
    marked: dict[str, Any] = {}
    for hook in model._forward_pre_hooks.values():
        engine = getattr(hook, "__self__", None)
        if isinstance(engine, _Engine):
            marked["foveate"] = engine.start(dict(inputs), cache, "prefix")
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **marked)
    return cache


def _checked_decoder(model: Any) -> Any:
    """The decoder of `model`, or one sentence on why it cannot be enhanced."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise FoveateError(
            f"{name} is not a transformers model: pass the model that "
            "AutoModelForImageTextToText.from_pretrained returns, without any wrapper around it."
        )
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not decoder._can_set_attn_implementation():
        raise FoveateError(
            f"{name} does not dispatch its attention through transformers' AttentionInterface, so "
            "its attention cannot be edited: load the version of the model that transformers ships."
        )
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        raise FoveateError(
            f"{name} soft-caps its attention scores, which no SDPA kernel reproduces: "
            "it cannot be enhanced."
        )
    return decoder


def _guarded(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, refusing up front the modes that would edit the wrong rows."""

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
        return generate(*args, **kwargs)

    return guarded
