"""Full attention maps, slowly: what the references of all methods stand on.

`FullMap` runs a conversation through a model with eager attention in every layer: whole maps
(B, H, Q, K) in float32, edited sample by sample by a subclass, nothing cut, nothing cached but the
keys and values themselves. A token's keys and values stay what they were when it was first read,
as in any cached decoding; positions are computed from the prompt, not observed. It shares no code
with the fast path; only the functions at the end know it.

A method's reference overrides what it needs, with plain loops, one sample and one layer at a time:

    class Louder(FullMap):
        edits = "text"                                      # which rows of the map; or "last"

        def scores(self, layer, sample, z):                 # (H, R, K), scaled, before the mask
            z[:, :, self.image[sample]] *= 1.5
            return z

        def weights(self, layer, sample, a): ...            # (H, R, K), after the softmax
        def begin(self): ...                                # before each forward: fresh state
        def entering(self, layer, hidden): ...              # (B, Q, width); also layer == depth
        def logits(self, logits): ...                       # (B, V) of the next token

    steps = Louder(model, layers=[1, 2]).run(inputs, steps=9)
    steps[0].logits                                         # of the prompt, (B, V)

`scores` and `weights` are called for the layers in `layers` (sliding-window layers never), for
samples with an image (all samples with ``needs_image = False``), and in a shared prefix only for
``edits = "text"``. What they get is a copy: change it and return it. Of the map's rows they get
those that the method edits: the last one, or those after the sample's last visual token. Padded
columns come with finite scores and with weights 0; the mask is added in between.

There for them, all about the conversation up to and including this forward (K columns):

* ``image[b]``, ``system[b]``, ``text[b]``, ``valid[b]``: columns, (n,) int64, of the visual tokens,
  of the real tokens before the first and after the last visual one, and of all real tokens;
* ``queries[b]``: which rows of this forward's map were handed over, (R,) int64; ``past``: columns
  from earlier forwards, so that row q of the map is column past + q;
* ``layers``, ``depth``, ``model``, ``decoder``, ``seen`` (concatenated inputs), ``turn`` (this
  forward's inputs), ``positions`` (C, B, K), ``phase`` ("prefix", "prompt", "decode"), ``scaling``.

State over steps is kept in attributes made in ``__init__``; state of one forward in `begin`. A
second stream is another `FullMap`, fed by an overridden `forward` before or after its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate import Method, enhance
from foveate.backends.transformers.compat import cache_of, decoder_of, passing

NAME = "full_map_reference"
STEPS = 9  # the prompt's row and eight decode steps


@dataclass
class Step:
    """One forward: the next token's logits (B, V), and per layer the last row used (B, H, K)."""

    logits: Tensor
    rows: dict[int, Tensor] = field(default_factory=dict)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    config = decoder_of(model).config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


def prompt_positions(model: PreTrainedModel, seen: dict[str, Tensor]) -> Tensor:
    """Positions (C, B, K) of a left-padded conversation; C = 3 for M-RoPE, else 1."""
    mask = seen["attention_mask"]
    if "image_grid_thw" not in seen or not hasattr(model.model, "get_rope_index"):
        return (mask.cumsum(-1) - 1).clamp(min=0)[None]
    known = inspect.signature(model.model.get_rope_index).parameters
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{key: seen[key] for key in keys if key in known})[0]


class FullMap:
    """One model and one conversation, without edits: plain eager attention."""

    edits = "last"
    needs_image = True
    blind = True  # without pixels there is no image
    image_token: int | None = None  # where the configuration names none

    def __init__(self, model: PreTrainedModel, layers: Iterable[int] | None = None) -> None:
        self.model, self.decoder = model, decoder_of(model)
        self.depth = self.decoder.config.num_hidden_layers
        full = full_attention_layers(model)
        self.layers = full if layers is None else sorted(set(full) & set(layers))
        self.seen: dict[str, Tensor] = {}
        self.cache: Any = None
        self.phase = ""

    # for subclasses

    def begin(self) -> None:
        pass

    def entering(self, layer: int, hidden: Tensor) -> None:
        pass

    def scores(self, layer: int, sample: int, z: Tensor) -> Tensor:
        return z

    def weights(self, layer: int, sample: int, a: Tensor) -> Tensor:
        return a

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    # one forward

    def forward(self, turn: dict[str, Tensor], prefix: bool = False) -> Step:
        """Feed a turn's inputs (B, n) on top of what was seen; a `prefix` has no last row."""
        self.turn, turn = turn, dict(turn)
        batch, length = turn["input_ids"].shape
        again = length == 1 and self.phase in ("prompt", "decode")
        self.phase = "prefix" if prefix else "decode" if again else "prompt"
        turn.setdefault("attention_mask", torch.ones_like(turn["input_ids"]))
        told = "mm_token_type_ids" in inspect.signature(type(self.model).forward).parameters
        if told and ("image_grid_thw" in self.seen or "image_grid_thw" in turn):
            turn.setdefault("mm_token_type_ids", torch.zeros_like(turn["input_ids"]))
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            if key in turn:
                parts = [self.seen[key], turn[key]] if key in self.seen else [turn[key]]
                self.seen[key] = torch.cat(parts, dim=0 if key == "image_grid_thw" else 1)
        token = self.image_token or self.model.config.image_token_id
        shown = turn["input_ids"] == token
        if (
            self.blind or self.phase == "decode"
        ) and "pixel_values" not in turn:  # image tokens that the model itself writes are text
            shown = torch.zeros_like(shown)
        self.past = self.seen["input_ids"].shape[1] - length
        old = self.seen.get("visual", shown[:, :0])
        self.seen["visual"] = torch.cat([old, shown], dim=1)
        self.locate()

        self.positions = prompt_positions(self.model, self.seen)
        given = self.positions[..., -length:]
        turn["position_ids"] = given if len(given) == 3 else given[0]
        turn["attention_mask"] = self.seen["attention_mask"]
        self.step = Step(logits=torch.empty(batch, 0))
        self.begin()
        with torch.no_grad(), self.installed():
            out = self.model(**turn, **passing(self.model, self.cache), use_cache=True)
            self.cache = cache_of(out)
            last = out.logits[:, -1].float()
            self.step.logits = last if prefix else self.logits(last)
        return self.step

    def locate(self) -> None:
        """Columns of each sample, and the rows that its edits get."""
        self.image, self.system, self.text, self.valid, self.queries = [], [], [], [], []
        visual, mask = self.seen["visual"], self.seen["attention_mask"]
        new = list(range(self.past, mask.shape[1]))
        for sample in range(len(mask)):
            real = mask[sample].nonzero()[:, 0]
            image = visual[sample].nonzero()[:, 0]
            first, last = (int(image[0]), int(image[-1])) if len(image) else (0, mask.shape[1])
            rows = [column - self.past for column in new if column > last]
            if self.edits == "last":
                rows = [] if self.phase == "prefix" else [len(new) - 1]
            if self.needs_image and len(image) == 0:
                rows = []
            self.image.append(image)
            self.system.append(real[real < first])
            self.text.append(real[real > last])
            self.valid.append(real)
            self.queries.append(torch.tensor(rows, dtype=torch.long))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Full maps in place of the language model's own attention."""
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
        config, layers = self.decoder.config, self.decoder.layers

        def enter(layer: int, args: Any, kwargs: Any) -> None:
            self.entering(layer, args[0] if args else kwargs["hidden_states"])

        def leave(out: Any) -> None:
            self.entering(self.depth, out if isinstance(out, Tensor) else out[0])

        before = config._attn_implementation
        config._attn_implementation = NAME
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: enter(layer, args, kwargs),
                with_kwargs=True,
            )
            for layer, module in enumerate(layers)
        ]
        hooks.append(layers[-1].register_forward_hook(lambda module, args, out: leave(out)))
        try:
            yield
        finally:
            config._attn_implementation = before
            for hook in hooks:
                hook.remove()

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Eager attention over all rows, query (B, H, Q, D), with the subclass's edits."""
        layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        self.scaling = scaling
        scores = query.float() @ key.float().transpose(2, 3) * scaling
        self.edit(self.scores, layer, scores)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        self.edit(self.weights, layer, weights)
        self.step.rows[layer] = weights[:, :, -1].clone()
        out = weights.to(value.dtype) @ value
        return out.transpose(1, 2).contiguous(), weights

    def edit(self, stage: Any, layer: int, maps: Tensor) -> None:
        """One stage on every sample's own rows of the maps (B, H, Q, K), put back in place."""
        for sample, rows in enumerate(self.queries):
            if layer in self.layers and len(rows):
                maps[sample][:, rows] = stage(layer, sample, maps[sample][:, rows])

    def run(
        self,
        inputs: dict[str, Tensor],
        steps: int = 1,
        turns: Sequence[dict[str, Tensor]] = (),
        tokens: Tensor | None = None,
        prefix_only: bool = False,
    ) -> list[Step]:
        """A prompt, `turns` of more prompt on the same cache, then ``steps - 1`` single tokens.

        Each token is the greedy one of the step before, or column ``i`` of `tokens` (B, steps - 1).
        Turns hold input_ids, and pixel_values ... as for the model. ``prefix_only``: the first
        forward is a shared prefix. Every forward adds a Step.
        """
        done = [self.forward(dict(inputs), prefix=prefix_only)]
        done += [self.forward(dict(turn)) for turn in turns]
        for i in range(steps - 1):
            token = done[-1].logits.argmax(-1) if tokens is None else tokens[:, i]
            done.append(self.forward({"input_ids": token[:, None]}))
        return done


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; equal infinities agree, an infinity against a number never does."""
    return (a - b).abs().where(a != b, torch.zeros(())).max().item()


def generate(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> Any:
    """What the fast path writes greedily, with raw logits."""
    with torch.no_grad(), enhance(model, *stack):
        return model.generate(
            **inputs,
            **{"max_new_tokens": STEPS, **options},
            return_dict_in_generate=True,
            output_logits=True,
        )


def disagreement(
    method: Method, reference: FullMap, inputs: dict[str, Tensor], steps: int = STEPS
) -> float:
    """Largest difference in logits between the fast path's greedy generation and `reference`.

    Over ``steps`` tokens, the first from the prompt; the reference is fed the tokens of the fast
    path, so that a tie broken differently is no difference. Equal infinities agree.
    """
    out = generate(reference.model, inputs, method, max_new_tokens=steps)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    slow = reference.run(inputs, steps, tokens=tokens)
    pairs = [(a, b.logits) for a, b in zip(out.logits, slow, strict=True)]
    return max(difference(a, b) for a, b in pairs)


def disagreement_in_turns(
    method: Method, reference: FullMap, talk: Sequence[dict[str, Tensor]]
) -> tuple[float, Any]:
    """`disagreement` over a conversation given piece by piece, and the fast path's cache."""
    turns = []
    for piece in talk:
        want = reference.forward(dict(piece)).logits
        places = reference.positions[..., -piece["input_ids"].shape[1] :]
        place = places if len(places) == 3 else places[0]
        mask = reference.seen["attention_mask"]
        turns.append((piece | {"attention_mask": mask, "position_ids": place}, want))
    worst, cache = 0.0, None
    with torch.no_grad(), enhance(reference.model, method):
        for given, want in turns:
            out = reference.model(**given, **passing(reference.model, cache), use_cache=True)
            cache = cache_of(out)
            worst = max(worst, difference(out.logits[:, -1], want))
    return worst, cache


def disagreement_in_beams(
    method: Method,
    reference: Callable[[], FullMap],
    inputs: dict[str, Tensor],
    alone: Sequence[dict[str, Tensor]],
    steps: int = 8,
) -> float:
    """Largest difference between a beam search's scores and the reference's of the same tokens.

    `alone` are the prompts of `inputs` one by one; each gets a `reference` of its own.
    """
    out = generate(
        reference().model, inputs, method, max_new_tokens=steps, num_beams=4, output_scores=True
    )
    assert (out.beam_indices.diff(dim=1) != 0).any(), "no beam took another's place"
    worst, length = 0.0, inputs["input_ids"].shape[1]
    for single, tokens, score in zip(
        alone, out.sequences[:, length:], out.sequences_scores, strict=True
    ):
        done = reference().run(single, steps, tokens=tokens[None, :-1])
        chances = [s.logits.log_softmax(-1)[0, t] for s, t in zip(done, tokens, strict=True)]
        worst = max(worst, abs(float(sum(chances) / steps - score)))
    return worst
