"""The engine: a few hooks around a vision-language model, and nothing kept on its modules.

`enhance` switches the language model to a registered attention function and installs hooks on the
top model, the decoder and, where a method asks for it, the decoder layers. What a sequence needs
lives on its KV cache as ``cache.foveate`` and travels to the attention function as a keyword
argument, so batches, parallel streams, several turns, static caches and compiled decoding need no
care.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...base.errors import FoveateError
from ...core.context import Context, Stack
from ...core.method import Method, as_stack
from ...core.visual import visual_mask, visual_token_ids
from . import compat
from .attention import register
from .cache import Stream, adopt
from .compat import NOT_INPUTS, length, vision_blocks
from .handshake import check_layers, handshake
from .heartbeat import astray, check_graphs, lost, note_beside_graphs
from .thin import Switch, thin_products

_enhanced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


class _Engine:
    """The hooks of one `enhance` block."""

    def __init__(
        self,
        name: str,
        stack: Stack,
        image_ids: tuple[int, ...],
        notes: list[dict[str, Any]],
        contrast: dict[str, Tensor] | None,
    ) -> None:
        self.name, self.stack, self.image_ids = name, stack, image_ids
        self.notes, self.views = notes, contrast
        self.befores = stack.at("before")
        self.thin = Switch()  # on while both streams are rows of the batch
        self.beside: tuple[dict[str, Any], int] | None = None  # what `second` is to run
        self.seen: dict[int, Tensor] = {}  # what vision blocks gave in this forward
        self.given: dict[str, Any] = {}  # to the forward, where a method asks for vision blocks
        self.thread = threading.get_ident()
        self.generating = False
        self.had_image = False  # in this call of generate
        self.undo: Callable[[], None] | None = None  # what a failed forward leaves to be undone

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
        if self.stack.vision:
            blocks = vision_blocks(model)
            for k in self.stack.vision:
                yield blocks[k - 1].register_forward_hook(functools.partial(self.look, k))

    def open(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the top model's forward: find or make the context and pass it on."""
        asked = kwargs.get("foveate", "prompt")
        if not isinstance(asked, str):  # the second stream, which `run` feeds
            return args, kwargs
        if not torch.compiler.is_compiling():
            self.check_thread()
            self.recover()
        if args:
            kwargs = dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
        cache = compat.cache_in(kwargs)
        ctx: Context | None = getattr(cache, "foveate", None)
        new = _new_tokens(kwargs)
        if ctx is None:
            ctx = self.start(kwargs, cache, asked, new)
        elif ctx.stack is not self.stack and ctx.stack.identity != self.stack.identity:
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
        if ctx.phase != "decode":
            mask = _prompt_mask(kwargs, cache)
            ctx.padded = mask is not None and not bool(mask.all())
            ctx.replays = compat.replays(self.stack.decoder)
        kwargs["foveate"] = ctx
        self.seen, self.given = {}, {}
        if self.stack.vision and ctx.phase != "decode":
            labels = {"labels": kwargs["labels"]} if kwargs.get("labels") is not None else {}
            self.given = self.piece(kwargs, cache) | labels
        self.thin.on = False
        if self.stack.owner is not None and ctx.acts(self.stack.owner):
            kwargs = self.contrast(model, ctx, kwargs, cache)
        return (), kwargs

    def check_thread(self) -> None:
        """Refuse a thread that did not open the block: its call would be edited as well."""
        if threading.get_ident() != self.thread:
            raise FoveateError(
                "Another thread has this model inside enhance(), where every call is edited: wait "
                "until it leaves the block, or open the block in the thread that calls the model."
            )

    def recover(self) -> None:
        """Put back what a forward that failed has left changed."""
        if self.undo is not None:
            self.undo()
            self.undo = None
        self.thin.on = False

    def start(self, kwargs: dict[str, Any], cache: Any, phase: str, new: int) -> Context:
        """The context of a new prompt of `new` tokens."""
        if compat.is_quantized(cache):
            raise FoveateError(
                "A quantised cache returns changed keys, so attention rows would not be exact: "
                "use the default cache."
            )
        if length(cache) > 0:
            raise FoveateError(
                "This cache was filled outside enhance(), where its visual tokens were not noted: "
                "fill it inside, with foveate.prefill() or by the first call."
            )
        self.refuse_lost_cache(kwargs, cache, new)
        self.refuse_right_padding(kwargs, cache)
        visual = self.visual(kwargs)
        times = len(visual) // max(len(self.notes), 1)  # beams
        notes = [own for own in self.notes for _ in range(times)]
        views = self.views and {k: self.repeated(v, times) for k, v in self.views.items()}
        ctx = Context(self.stack, visual, phase, notes, views)
        if self.generating and self.had_image and ctx.empty:
            raise lost(
                self.stack.model,
                "a step of generate() began a new prompt without the image of the first",
            )
        self.had_image |= not ctx.empty
        if cache is not None:
            adopt(cache, ctx)
        self.warn(ctx)
        return ctx

    def refuse_lost_cache(self, kwargs: dict[str, Any], cache: Any, new: int) -> None:
        """A mask for more tokens than are given tells of a filled cache, and here is none."""
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.dim() == 2) or mask.shape[1] <= new:
            return
        if mask.shape[1] == compat.capacity(cache):  # as wide as a static cache will be
            return
        names = " or ".join(compat.CACHE_NAMES)
        raise FoveateError(
            f"The mask covers {mask.shape[1]} tokens, but the model got {new} and no filled cache: "
            f"pass the cache of the tokens before as {names}. If you did, transformers "
            f"{compat.VERSION} has renamed it: upgrade foveate, or install the release that its "
            "lock names."
        )

    def repeated(self, pixels: Tensor, times: int) -> Tensor:
        """Pixels with those of each prompt `times` over, as `generate` repeats its inputs."""
        if len(self.notes) == 1:
            return torch.cat([pixels] * times)
        return pixels.repeat_interleave(times, 0)

    def extend(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> None:
        """More prompt on a filled cache: another turn, or the question after a prefix."""
        self.refuse_right_padding(kwargs, cache)
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

    def refuse_right_padding(self, kwargs: dict[str, Any], cache: Any) -> None:
        mask = _prompt_mask(kwargs, cache)
        if self.stack.last_rows and mask is not None and not bool(mask[:, -1].all()):
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

    def context(self, kwargs: dict[str, Any], where: str) -> Context | None:
        """The context among the arguments of a module; None where it is to run plain."""
        if "foveate" not in kwargs:
            raise astray(self.stack.model, where)
        return kwargs["foveate"]

    def locate(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the decoder: note the final positions of the prompt."""
        ctx = self.context(kwargs, "the decoder")
        if ctx is None:
            return
        if heartbeat := ctx.watched:
            heartbeat.decoder()
        if ctx.phase == "decode":
            return
        embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        new, batch = (kwargs["input_ids"] if embeds is None else embeds).shape[1], len(ctx.visual)
        past = ctx.positions.shape[2]
        if positions is None:
            positions = torch.arange(past, past + new, device=ctx.visual.device)[None]
        if positions.dim() == 2:
            positions = positions[None]
        positions = positions[-3:, :batch]  # Qwen may put text positions in front
        positions = positions.expand(-1, batch, -1)
        if past:
            positions = positions.expand(len(ctx.positions), -1, -1)
            positions = torch.cat([ctx.positions, positions.to(ctx.positions.device)], 2)
        ctx.positions = positions
        if self.stack.vision and ctx.visual[:, -new:].any():
            self.see(ctx)

    def look(self, k: int, block: Any, args: Any, out: Any) -> None:
        """After vision block k - 1."""
        self.seen[k] = out[0] if isinstance(out, tuple) else out

    def see(self, ctx: Context) -> None:
        """Between the vision tower and the decoder: the methods get what the tower's blocks gave.

        Of two streams in one batch it is the first one's.
        """
        seers = [i for i in self.stack.at("see") if ctx.acts(i)]
        if seers and not self.seen:
            raise FoveateError(
                f"{self.stack.methods[seers[0]].name} reads the vision tower, which did not run "
                "for this prompt: pass pixel_values instead of images that were encoded before."
            )
        times = 2 if ctx.paired else 1
        ctx.vision = {k: v[: len(v) // times] for k, v in self.seen.items()}
        ctx.inputs = self.given
        for i in seers:
            ctx.use(i).see(ctx)
        ctx.vision, ctx.inputs, self.seen, self.given = {}, {}, {}, {}

    def enter(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before decoder layer `layer`."""
        ctx = self.context(kwargs, f"layer {layer}")
        if ctx is None:
            return None
        hidden = compat.hidden_in(args, kwargs)
        return compat.with_hidden(args, kwargs, self.before(hidden, ctx, layer))

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the last decoder layer: the input of the final norm."""
        ctx = self.context(kwargs, "the last layer")
        if ctx is None:
            return out
        if isinstance(out, tuple):
            return (self.before(out[0], ctx, self.stack.depth), *out[1:])
        return self.before(out, ctx, self.stack.depth)

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        """The residual stream entering a layer, or the final norm, after the methods saw it."""
        if heartbeat := ctx.watched:
            heartbeat.input(layer)
        if not ctx.replays:
            return self.shown(hidden, ctx, layer)
        with ctx.visit(("before", layer)):
            return self.shown(hidden, ctx, layer)

    def shown(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        whole, hidden = hidden, hidden[: len(ctx.visual)]
        for i in self.befores:
            if ctx.acts(i):
                hidden = ctx.keep(i, ctx.use(i).before(hidden, ctx, layer), hidden)
        return torch.cat([hidden, whole[len(hidden) :]]) if ctx.paired else hidden

    def close(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the top model's forward: attach the context, contrast, edit the last logits."""
        ctx = self.context(kwargs, "the closing hook")
        if ctx is None:
            return out
        if isinstance(out, tuple):
            raise lost(
                model,
                "its forward returned a tuple; if you asked for one, leave out return_dict=False",
            )
        if heartbeat := ctx.watched:
            heartbeat.close()
        elif ctx.heartbeat is not None and not torch.compiler.is_compiling():
            note_beside_graphs(self.name, *self.stack.edited[: ctx.heartbeat.edited])
        cache = compat.cache_of(out)
        if cache is None:
            self.check_cacheless(kwargs)
            cache = compat.cache_in(kwargs)
        elif getattr(cache, "foveate", None) is None:
            adopt(cache, ctx)
        other = self.second(model, ctx, kwargs, out)
        if ctx.phase == "prefix":
            self.hand_on(cache, ctx)
            return out
        editors = [i for i in self.stack.at("logits") if ctx.acts(i)]
        if editors:
            last = old = out.logits[:, -1]
            for i in editors:
                edited = ctx.use(i).logits(last, other if i == self.stack.owner else None, ctx)
                last = ctx.keep(i, edited, last)
            if last is not old:
                out.logits = torch.cat([out.logits[:, :-1], last[:, None].to(old.dtype)], 1)
        self.hand_on(cache, ctx)
        return out

    def hand_on(self, cache: Any, ctx: Context) -> None:
        """What follows on this cache has a context of its own."""
        if cache is not None and ctx.phase != "decode":
            cache.foveate = ctx.follow()

    def check_cacheless(self, kwargs: dict[str, Any]) -> None:
        """Refuse an output without a cache where one was asked for."""
        decoder, asked = self.stack.decoder, kwargs.get("use_cache")
        asked = decoder.config.use_cache if asked is None else asked
        if asked and not decoder.training:
            raise lost(self.stack.model, "its output has no cache under a known name")

    # -- the second stream -------------------------------------------------------------------------

    def contrast(
        self, model: Any, ctx: Context, kwargs: dict[str, Any], cache: Any
    ) -> dict[str, Any]:
        """Before the forward: its inputs, with the second stream's beside them where that fits.

        Where only pixels differ, both streams are rows of one batch; otherwise `second` runs the
        other one after this forward, on its own cache.
        """
        self.beside = None
        if ctx.phase == "decode":
            return self.twice(model, ctx, kwargs, {}) if ctx.paired else kwargs
        piece = self.piece(kwargs, cache)
        new = piece["attention_mask"].shape[1]
        owner = ctx.use(cast(int, self.stack.owner))
        changed = dict(piece) if owner.ahead else None
        if bool(ctx.visual[:, -new:].any()):
            changed = owner.contrast(dict(piece), ctx)
        if owner.ahead:
            if changed is not None and ctx.phase == "prompt":
                self.go_ahead(model, ctx, kwargs | _pixels(changed), cache)
            return kwargs
        if changed is None:
            if not ctx.paired and ctx.other is None:
                return kwargs
            changed = piece
        alike = changed.keys() == piece.keys() and all(
            changed[k] is v or (k in _pixels(piece) and changed[k].shape == v.shape)
            for k, v in piece.items()
        )
        if ctx.paired and not alike:
            raise FoveateError(
                f"{owner.name} changed only pixels in the first prompt and more in a later one, "
                "which one batch cannot hold: start from a fresh cache."
            )
        fresh = ctx.other is None and kwargs.get("labels") is None and not compat.allocated(cache)
        if ctx.paired or (alike and fresh):
            ctx.paired = True
            if cache is not None:
                adopt(cache, ctx)
            return self.twice(model, ctx, kwargs, _pixels(changed))
        if ctx.other is None:
            ctx.other = self.fork(ctx, kwargs, cache, ctx.visual.shape[1] - new)
        ctx.other.aligned &= changed["attention_mask"] is piece["attention_mask"]
        self.beside = changed, new if ctx.other.aligned else 0
        return kwargs

    def piece(self, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
        """The inputs of this piece of prompt alone, with its own mask (B, new) int64."""
        inputs = {k: v for k, v in kwargs.items() if k not in NOT_INPUTS and v is not None}
        inputs.pop("position_ids", None)
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
        mask = _prompt_mask(kwargs, cache)
        mask = inputs.get("attention_mask") if mask is None else mask
        if isinstance(mask, dict):  # generate() with a static cache
            mask = mask.get("full_attention")
        if mask is not None and mask.dim() == 4:
            mask = mask if mask.dtype == torch.bool else mask >= 0
            mask = mask[:, 0, -1, : length(cache) + ids.shape[1]].expand(len(ids), -1)
        if mask is None:
            mask = torch.ones_like(ids)
        return inputs | {"attention_mask": mask[:, -ids.shape[1] :].long()}

    def twice(
        self, model: Any, ctx: Context, kwargs: dict[str, Any], changed: dict[str, Any]
    ) -> dict[str, Any]:
        """The forward's inputs with every sample twice, the second half with `changed`."""
        batch, self.thin.on = len(ctx.visual), True

        def double(value: Any, other: Any, axis: int = 0) -> Any:
            if isinstance(value, dict):
                return {k: double(v, v) for k, v in value.items()}
            if isinstance(value, list):
                return value + other
            if not isinstance(value, Tensor) or value.shape[axis] == 1 < batch:
                return value  # one row for all samples
            return torch.cat([value, other], axis)

        deltas = compat.kept_positions(model)
        self.undo = functools.partial(compat.keep_positions, model, deltas)
        if deltas is not None and len(deltas) == batch:
            compat.keep_positions(model, deltas.repeat(2, 1))
        return kwargs | {
            k: double(v, changed.get(k, v), int(k == "position_ids" and v.dim() == 3))
            for k, v in kwargs.items()
            if k not in NOT_INPUTS and v is not None
        }

    def second(self, model: Any, ctx: Context, kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """After the forward: the second stream's next-token logits (B, V), or None."""
        batch = len(ctx.visual)
        if ctx.paired:
            self.thin.on = False
            deltas, other = compat.kept_positions(model), out.logits[batch:, -1]
            self.undo = None
            if deltas is not None and len(deltas) == 2 * batch:
                compat.keep_positions(model, deltas[:batch])
            compat.keep_rows(out, batch)
            return other
        stream = ctx.other
        if stream is None:
            return None
        if ctx.phase == "decode":
            names = ("input_ids", "inputs_embeds")
            token = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
            return self.run(model, stream, token, stream.mask.new_ones(batch, 1), None)
        (changed, new), self.beside = cast(Any, self.beside), None
        mask = changed.pop("attention_mask")
        return self.run(model, stream, changed, mask, ctx.positions[:, :, -new:] if new else None)

    def fork(self, ctx: Context, kwargs: dict[str, Any], cache: Any, filled: int) -> Stream:
        """A new second stream; text before the first image is the same in both."""
        config, mask = self.stack.decoder.config, kwargs.get("attention_mask")
        asked, own = kwargs.get("use_cache"), None
        if not filled and (cache is not None or (config.use_cache if asked is None else asked)):
            own = compat.empty_cache(self.stack.decoder)  # where the model makes its own, too
        elif cache is not None:
            own = copy.deepcopy(cache)
            own.foveate = None
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = ctx.visual.new_ones((len(ctx.visual), filled), dtype=torch.long)
        mask, noted = mask[:, :filled].long(), ctx.positions.amax(0)[:, :filled]
        position = torch.where(mask.bool(), noted + 1, 0).amax(1) if filled else mask.sum(1)
        return Stream(own, mask, position)

    def run(
        self,
        model: Any,
        stream: Stream,
        inputs: dict[str, Any],
        mask: Tensor,
        positions: Tensor | None,
    ) -> Tensor | None:
        """Feed a piece of prompt or a token to the second stream; next-token logits (B, V).

        Args:
            mask: (B, new) int64. positions: (C, B, new), or None to count on as text does.
        """
        if not mask.shape[1]:
            return None
        past = stream.mask.shape[1]
        mrope = compat.remembers_positions(model)
        ids = inputs.get("input_ids")
        if positions is None:
            positions = (stream.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)[None]
            if mrope:
                positions = positions.expand(3, -1, -1)
                if ids is not None and not past and bool(self.visual(inputs).any()):
                    positions = None  # other pictures: the model works them out
        stream.mask = torch.cat([stream.mask, mask], 1)
        if positions is not None:
            inputs = inputs | {"position_ids": positions if len(positions) == 3 else positions[0]}
        with compat.keeping_positions(model):
            out = model(
                **inputs,
                **compat.passing(model, stream.cache),
                attention_mask=stream.mask,
                use_cache=stream.cache is not None,
                logits_to_keep=1,
                foveate=None,
            )
            if positions is None:
                deltas = cast(Tensor, compat.kept_positions(model))
                stream.position = past + mask.shape[1] + deltas[:, 0]
            else:
                here = torch.where(mask.bool(), positions.amax(0) + 1, 0)
                stream.position = stream.position.maximum(here.amax(1))
        return out.logits[:, -1]

    def go_ahead(self, model: Any, ctx: Context, kwargs: dict[str, Any], cache: Any) -> None:
        """A plain pass over this piece of prompt: its next-token logits become ``ctx.ahead``."""
        inputs = {k: v for k, v in kwargs.items() if k not in NOT_INPUTS}
        side = copy.deepcopy(cache)
        if side is not None:
            side.foveate = None
        with compat.keeping_positions(model):
            out = model(
                **inputs,
                **compat.passing(model, side),
                use_cache=side is not None,
                logits_to_keep=1,
                foveate=None,
            )
        ctx.ahead = out.logits[:, -1]


def _new_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens a forward is given."""
    ids = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if ids is None else ids).shape[1]


def _prompt_mask(kwargs: dict[str, Any], cache: Any) -> Tensor | None:
    """The mask (B, K) of the tokens so far, where it is given in two dimensions.

    For a static cache it may be as wide as the cache will be.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask[:, : length(cache) + _new_tokens(kwargs)]


def _pixels(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k.startswith("pixel_values")}


# -- the door --------------------------------------------------------------------------------------


@contextmanager
def enhance(model: Any, *methods: Method | str, image_token_id: int | None = None) -> Iterator[Any]:
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
    model: Any,
    methods: tuple[Method, ...],
    image_token_id: int | None = None,
    notes: list[dict[str, Any]] | None = None,
    contrast: dict[str, Tensor] | None = None,
    plans: dict[str, Any] | None = None,
) -> Iterator[None]:
    """`enhance` for methods whose `rewrite`, if any, has been run by the caller.

    Args:
        notes: one per prompt, for ``ctx.notes``. contrast: the prompts' pixels for a second
            stream, as the processor returns them, for ``ctx.contrast``; only with notes.
        plans: method name -> what its `setup` would return, such as a module in training.
    """
    model = compat.unwrapped(model)
    methods = tuple(m for m in methods if not m.is_neutral)
    if not methods:
        yield
        return
    decoder = handshake(model).decoder
    stack = Stack(model, methods, plans)
    check_layers(model, stack.edited)
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
    with ExitStack() as leaving:  # whatever fails, every step is undone
        leaving.callback(_enhanced.discard, decoder)
        usual = compat.attention_name(decoder)
        leaving.callback(compat.set_attention_name, decoder, usual)
        name = register(stack.identity, usual)
        engine = _Engine(name, stack, image_ids, notes or [], contrast)
        compat.set_attention_name(decoder, name)
        if compat.attention_name(decoder) != name or not compat.is_registered(name):
            raise lost(model, "it does not take an attention function and its masks by name")
        for handle in engine.install():
            leaving.callback(handle.remove)
        leaving.callback(engine.recover)
        if getattr(model, "generate", None) is not None:
            guarded = _guarded(model.generate, engine)
            leaving.enter_context(compat.replaced(model, "generate", guarded))
        contrasts = stack.owner is not None and stack.methods[stack.owner].pixels
        if contrasts or stack.vision:
            expanding = functools.partial(_expanding, visual=engine.visual)
            leaving.enter_context(compat.pixels_to_the_forward(model, expanding))
        if contrasts:
            engine.thin = leaving.enter_context(thin_products(model))
        yield
        check_graphs(name, stack)


def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    """Fill a cache with a prefix (system text and images) that several questions will share.

    Inside `enhance` the prefix is marked as such: no last-row edit, no step of methods that
    accumulate over tokens. Fork the result with ``copy.deepcopy`` and ``batch_repeat_interleave``.

    Args:
        inputs: what the processor returned for the prefix.

    Returns:
        A dynamic cache that holds the prefix.
    """
    cache = compat.empty_cache(model.get_decoder())
    enhanced = model.get_decoder() in _enhanced
    marked = {"foveate": "prefix"} if enhanced else {}
    with torch.no_grad():
        given = inputs | compat.passing(model, cache) | marked
        model(**given, use_cache=True, logits_to_keep=1)
    return cache


def _guarded(generate: Callable[..., Any], engine: _Engine) -> Callable[..., Any]:
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
        engine.check_thread()
        engine.generating, engine.had_image = True, False
        try:
            return generate(*args, **kwargs)
        finally:
            engine.generating = False

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
