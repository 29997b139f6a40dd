"""The hooks of one `enhance` block: they find or make the context of a forward and pass it on."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...base.errors import FoveateError
from ...core.prompt import Vision
from ...core.rows import Phase, Stream
from ...core.sequence import Stack
from ...core.visual import visual_mask
from . import compat, compat_cache, compat_parts
from .cache import adopt
from .compat_cache import length
from .context import Aside, Context
from .feeding import FeedForwards
from .heartbeat import astray, lost, note_beside_graphs
from .streams import Streams, new_tokens, piece, prompt_mask


class Hooks:
    """On the top model, the decoder and, where a method asks for it, parts of layers and the tower.

    Args:
        name: of the attention implementation.
        image_ids: of the placeholder tokens that stand for images.
        notes, contrast: see `attach`.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        stack: Stack,
        image_ids: tuple[int, ...],
        notes: list[dict[str, Any]],
        contrast: dict[str, Tensor] | None,
    ) -> None:
        self.model, self.decoder = model, compat.decoder_of(model)
        self.name, self.stack, self.image_ids = name, stack, image_ids
        self.notes, self.views = notes, contrast
        self.streams = Streams(model, stack, self.visual)
        self.befores = stack.at("before")
        self.seen: dict[int, Tensor] = {}  # what vision blocks gave in this forward
        self.given: dict[str, Any] = {}  # to the forward, where a method asks for vision blocks
        self.feedings = FeedForwards(model, name, stack, self.context)
        self.thread = threading.get_ident()
        self.generating = False
        self.had_image = False  # in this call of generate

    def install(self) -> Iterator[Any]:
        """Register every hook; yields the handles."""
        yield self.model.register_forward_pre_hook(self.open, with_kwargs=True)
        yield self.model.register_forward_hook(self.close, with_kwargs=True)
        yield self.decoder.register_forward_pre_hook(self.locate, with_kwargs=True)
        if self.befores:
            for i, layer in enumerate(self.decoder.layers):
                hook = functools.partial(self.enter, i)
                yield layer.register_forward_pre_hook(hook, with_kwargs=True)
            yield self.decoder.layers[-1].register_forward_hook(self.leave, with_kwargs=True)
        yield from self.feedings.install()
        if self.stack.vision:
            blocks = compat_parts.vision_blocks(self.model)
            for k in self.stack.vision:
                yield blocks[k - 1].register_forward_hook(functools.partial(self.look, k))

    def open(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the top model's forward: find or make the context and pass it on."""
        asked = kwargs.get("foveate", "prompt")
        self.feedings.encode_for(None)
        if not isinstance(asked, str):  # the second stream, which `run` feeds
            return args, kwargs
        if not torch.compiler.is_compiling():
            self.check_thread()
            self.streams.recover()
            self.refuse_lone_forward(asked)
        if args:
            kwargs = dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
        cache = compat.cache_in(kwargs)
        ctx: Context | None = getattr(cache, "foveate", None)
        new = new_tokens(kwargs)
        if ctx is None:
            ctx = self.start(kwargs, cache, cast(Phase, asked), new)
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
            mask = prompt_mask(kwargs, cache)
            ctx.padded = mask is not None and not bool(mask.all())
            ctx.replays = compat.replays(self.decoder)
            if self.stack.fed:
                ctx.real = piece(kwargs, cache)["attention_mask"].bool()
        kwargs["foveate"] = ctx
        self.seen, self.given = {}, {}
        if self.stack.vision and ctx.phase != "decode":
            self.given = piece(kwargs, cache) | {"labels": kwargs.get("labels")}
        kwargs = self.streams.before(ctx, kwargs, cache)
        self.feedings.encode_for(ctx)
        return (), kwargs

    def check_thread(self) -> None:
        """Refuse a thread that did not open the block: its call would be edited as well."""
        if threading.get_ident() != self.thread:
            raise FoveateError(
                "Another thread has this model inside enhance(), where every call is edited: wait "
                "until it leaves the block, or open the block in the thread that calls the model."
            )

    def refuse_lone_forward(self, phase: str) -> None:
        """A method that searches does nothing in a forward, unless it is the one that asks."""
        searching = self.stack.at("search")
        if searching and not self.generating and phase != "prefix":
            raise FoveateError(
                f"{self.stack.methods[searching[0]].name} chooses tokens by a search of its own, "
                "which a single forward is no part of: call generate()."
            )

    def start(self, kwargs: dict[str, Any], cache: Any, phase: Phase, new: int) -> Context:
        """The context of a new prompt of `new` tokens."""
        if compat_cache.is_quantized(cache):
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
        notes = [note for note in self.notes for _ in range(times)]
        views = self.views and {k: self.repeated(v, times) for k, v in self.views.items()}
        ctx = Context(self.model, self.stack, visual, phase, notes, views)
        if self.generating and self.had_image and ctx.empty:
            raise lost(
                self.model,
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
        if mask.shape[1] == compat_cache.capacity(cache):  # as wide as a static cache will be
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
        ctx.take_in(
            torch.cat([pad(ctx.visual, (0, gap)), new.to(ctx.visual.device)], 1), new.shape[1]
        )
        self.warn(ctx)

    def visual(self, kwargs: dict[str, Any]) -> Tensor:
        ids = kwargs.get("input_ids")
        if not self.image_ids and kwargs.get("mm_token_type_ids") is None and ids is not None:
            return torch.zeros_like(ids, dtype=torch.bool)  # allowed: no method needs an image
        return visual_mask(self.image_ids, ids, kwargs.get("mm_token_type_ids"))

    def refuse_right_padding(self, kwargs: dict[str, Any], cache: Any) -> None:
        mask = prompt_mask(kwargs, cache)
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
            raise astray(self.model, where)
        ctx = kwargs["foveate"]
        return None if isinstance(ctx, Aside) else ctx

    def locate(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the decoder: note a prompt's positions, put in a token's or other embeddings."""
        ctx = self.context(kwargs, "the decoder")
        if isinstance(kwargs["foveate"], Aside):
            return args, self.streams.embedded(kwargs["foveate"].main, kwargs)
        if ctx is None:
            return None
        if heartbeat := ctx.watched:
            heartbeat.decoder()
        if ctx.abreast:
            return args, self.streams.placed(ctx, kwargs)
        if ctx.phase == "decode":
            return None
        embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        new, batch = (kwargs["input_ids"] if embeds is None else embeds).shape[1], len(ctx.visual)
        past = ctx.positions.shape[2]
        if positions is None:
            positions = torch.arange(past, past + new, device=ctx.visual.device)[None]
        if positions.dim() == 2:
            positions = positions[None]
        axes = max(3, compat.position_axes(self.model))
        positions = positions[-axes:, :batch]  # Qwen may put text positions in front
        positions = positions.expand(-1, batch, -1)
        if past:
            positions = positions.expand(len(ctx.positions), -1, -1)
            positions = torch.cat([ctx.positions, positions.to(ctx.positions.device)], 2)
        ctx.positions = positions
        if (self.stack.vision or self.stack.at("tower")) and ctx.visual[:, -new:].any():
            self.feedings.check_tower(ctx)
            if self.stack.vision:
                self.see(ctx)
        return None

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
        times, given, visual = 2 if ctx.doubled else 1, self.given, ctx.visual
        states = {k: v[: len(v) // times] for k, v in self.seen.items()}
        mask = given["attention_mask"]
        vision = Vision(
            states=states,
            visual=visual[:, -mask.shape[1] :],
            mask=mask,
            labels=given["labels"],
            video="pixel_values_videos" in given,
            pack=lambda k, project: compat_parts.image_features(
                self.model, states[k], k, project, given
            ),
        )
        for i in seers:
            self.stack.methods[i].see(vision, ctx.seen_by(i))
        self.seen, self.given = {}, {}

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
        whole, hidden = hidden, hidden[: len(ctx.visual)]
        with ctx.visit("before", layer) if ctx.replays else nullcontext():
            for i in self.befores:
                if ctx.acts(i):
                    stream = Stream(hidden, layer)
                    edited = self.stack.methods[i].before(stream, ctx.seen_by(i))
                    hidden = ctx.keep(i, edited, hidden)
        return torch.cat([hidden, whole[len(hidden) :]]) if ctx.doubled else hidden

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
            note_beside_graphs(self.name, *ctx.heartbeat.passed)
        cache = compat.cache_of(out)
        if cache is None:
            self.check_cacheless(kwargs)
            cache = compat.cache_in(kwargs)
        elif getattr(cache, "foveate", None) is None:
            adopt(cache, ctx)
        other = self.streams.after(ctx, kwargs, out)
        if ctx.phase == "prefix":
            self.hand_on(cache, ctx)
            return out
        editors = [i for i in self.stack.at("logits") if ctx.acts(i)]
        if editors:
            last = old = out.logits[:, -1]
            for i in editors:
                mine = other if i == self.stack.owner else None
                edited = self.stack.methods[i].logits(last, mine, ctx.seen_by(i))
                last = ctx.keep(i, edited, last)
            if last is not old:
                out.logits = torch.cat([out.logits[:, :-1], last[:, None].to(old.dtype)], 1)
        self.hand_on(cache, ctx)
        return out

    def hand_on(self, cache: Any, ctx: Context) -> None:
        """Give the cache a new context for what follows."""
        if cache is not None and ctx.phase != "decode":
            cache.foveate = ctx.follow()

    def check_cacheless(self, kwargs: dict[str, Any]) -> None:
        """Refuse an output without a cache where one was asked for."""
        decoder, asked = self.decoder, kwargs.get("use_cache")
        asked = decoder.config.use_cache if asked is None else asked
        if asked and not decoder.training:
            raise lost(self.model, "its output has no cache under a known name")
