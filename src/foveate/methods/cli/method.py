"""CLI: cross-layer injection (arXiv 2601.10710), the method that is trained.

A vision-language model sees the last layer of its vision tower, at the entry of its first decoder
layer. Here several vision layers are offered to several decoder layers, and what the decoder holds
decides how much of each it takes. `foveate train cli` trains it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...base.artifact import check_model, read_config, weights_stamp
from ...core import Anatomy, FoveateError, Method, Sequences, Stream, Vision, costly, file
from ...core.sequence import remembered
from .module import KIND, CrossLayerInjection, ImageFeatures, Settings, settings_in

SERVES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "internvl",
    "smolvlm",
    "idefics3",
    "gemma3",
    "glm4v",
)

KEPT = 4  # injections that stay loaded for a model


@dataclass(frozen=True)
class CLI(Settings, Method):  # type: ignore[misc]
    """Cross-layer injection: decoder layers take from many vision layers, by a learnt gate.

    The model's projector and a low-rank path bring each vision layer to the language model (AMP).
    What enters a decoder layer at the image's tokens gets their sum, each times a gate that
    compares a summary of the vision layer with one of the hidden state (AGF); other tokens get
    nothing. Where patches are merged to one token before the projector or in it (Qwen, GLM-V,
    InternVL, SmolVLM, Gemma), each layer's are merged in the same way (inferred). The equations
    stand in `methods/cli/module.py`, with what is reported and what is inferred. All of it happens
    in the prefill; the vision states come from the ordinary forward, and tiles are packed as the
    model packs them.

    An answer never reaches the gate: in training the hidden summary sees the tokens before the
    first label. A prompt that holds earlier answers is summarised with them; train with
    summary="image" where conversations have several turns.

    Attributes:
        path: folder or hub name of a trained injection, which brings its own settings.
        seed: any number: without a path it makes a fresh injection, which has learnt nothing.
        strength: factor of what is added, any number; 0 is the plain model. Not in the paper.
    """

    path: str = file()
    seed: int | None = costly(None, limit=None)  # a module is made, and has learnt nothing
    strength: float = 1.0

    name: ClassVar[str] = "cli"
    paper: ClassVar[str] = "2601.10710"
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    example: ClassVar[dict[str, Any]] = {"seed": 0, "rank": 4, "heads": 4, "start": 0.0}
    passes: ClassVar[str] = "none; needs training"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank must be at least 1")
        self.require(self.heads >= 1, "heads must be at least 1")
        self.require(self.width >= self.heads, "width must be at least heads")
        self.require(
            not (self.path and self.seed is not None),
            "give path, a trained injection, or seed, a fresh one",
        )

    @property
    def shares_prefix(self) -> bool:  # type: ignore[override]
        """Whether the question does not reach the gates."""
        summary = self.summary
        if self.path:
            summary = read_config(self.path, KIND)["settings"].get("summary")
        return summary == "image"

    # -- for a model -------------------------------------------------------------------------------

    def resolve(self, anatomy: Anatomy) -> CLI:
        """The same method with the settings of the trained injection, or defaults for a model.

        Raises:
            FoveateError: on a model whose images it cannot follow, on an injection that belongs to
                another model, and where there is none at all.
        """
        kind, tower = anatomy.kind, anatomy.tower
        if kind not in SERVES or tower is None:
            raise FoveateError(
                f"cli follows the images of {', '.join(SERVES)} through tower and projector, not "
                f"those of {kind}: use a method that needs no training."
            )
        used, blocks = _used_layer(anatomy), tower.depth
        if self.path:
            filled = self._trained(anatomy)
        elif self.seed is None:
            raise FoveateError(
                "cli is trained: give path=FOLDER, which `foveate train cli` makes, or seed=0 for "
                "one that has learnt nothing."
            )
        else:
            depth = anatomy.depth
            quarters = [-(-used * i // 4) for i in range(1, 5)]
            spread = [used] if self.routes == "one-to-many" else quarters
            every = tuple(range(0, depth, min(6, max(1, depth // 4))))
            filled = dataclasses.replace(
                self,
                layers=every if self.layers is None else self.layers,
                vision_layers=tuple(self.vision_layers or spread),
            )
        vision_layers = tuple(sorted(set(filled.vision_layers or ())))
        for k in vision_layers:
            if not 1 <= k <= blocks:
                raise FoveateError(
                    f"cli: vision layer {k} does not exist, this tower has layers 1 to {blocks}."
                )
        filled = dataclasses.replace(filled, vision_layers=vision_layers)
        resolved = Method.resolve(filled, anatomy)
        assert isinstance(resolved, CLI)
        return resolved

    def _trained(self, anatomy: Anatomy) -> CLI:
        """The same method with the trained injection's settings, if it belongs to this model."""
        config = check_model(self.path, KIND, _base(anatomy))
        settings, default = settings_in(config["settings"]), settings_in(Settings())
        for name, value in settings.items():
            if getattr(self, name) not in (default[name], value):
                raise FoveateError(
                    f"cli: {self.path} was trained with {name}={value!r}: leave out {name}."
                )
        return dataclasses.replace(self, **settings)

    def build(self, anatomy: Anatomy) -> CrossLayerInjection:
        """A module for a model, float32 and on its device; `self` is resolved.

        Near identity where it is fresh: the low-rank paths start at 0, the gates almost closed.
        """
        assert anatomy.tower is not None
        if self.path:
            injection = CrossLayerInjection.from_pretrained(self.path)
        else:
            vision_size, text_size = anatomy.tower.merged or anatomy.tower.width, anatomy.width
            heads = min(self.heads, max(1, text_size // 8))
            width = min(self.width, text_size) // heads * heads
            settings = settings_in(self) | {"heads": heads, "width": width}
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(self.seed or 0)
                injection = CrossLayerInjection(
                    Settings(**settings),
                    base=_base(anatomy),
                    vision_size=vision_size,
                    text_size=text_size,
                )
        return injection.to(anatomy.tower.device)

    def setup(self, anatomy: Anatomy) -> CrossLayerInjection:
        """The module in the model's dtype, each part beside the layer that it serves."""
        stamp = weights_stamp(self.path, KIND) if self.path else None
        key = (dataclasses.replace(self, strength=1.0), stamp, anatomy.dtype, str(anatomy.device))
        loaded = anatomy.kept.setdefault("cli", {})
        if key not in loaded:
            injection = self.build(anatomy).to(anatomy.dtype).eval().requires_grad_(False)
            for name, gate in injection.gates.items():
                gate.to(anatomy.layer_device(int(name.split("-")[0])))
            while len(loaded) >= KEPT:
                del loaded[next(iter(loaded))]
            loaded[key] = injection
        return loaded[key]

    # -- in a forward ------------------------------------------------------------------------------

    def see(self, vision: Vision, seq: Sequences) -> None:
        """AMP (1): bring the vision states to the language model, packed as its own."""
        if vision.video:
            raise FoveateError("cli follows images, not videos: leave out the video.")
        injection: CrossLayerInjection = seq.plan
        visual = vision.visual
        total, features = int(visual.sum()), {}
        for k in map(int, injection.paths):
            packed = vision.pack(k, functools.partial(injection.project, k))
            if len(packed) != total:
                raise FoveateError(
                    f"cli: the prompt has {total} image tokens and its images {len(packed)} "
                    "features: make the inputs with the model's own processor."
                )
            empty = packed.new_zeros(*visual.shape, packed.shape[-1])
            features[k] = empty.masked_scatter(visual.to(packed.device)[..., None], packed)
        summarised = visual if self.summary == "image" else vision.mask.bool()
        if self.summary == "prompt" and vision.labels is not None:
            unanswered = (vision.labels != -100).cumsum(1) == 0
            summarised = summarised & unanswered.to(summarised.device)
        seq.scratch["image"] = ImageFeatures(features, visual, summarised)
        seq.memory["gates"] = {}

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        """AGF (2), (3) and update (4)."""
        layer = stream.layer - (self.place == "after")
        image: ImageFeatures | None = seq.scratch.get("image")
        if image is None or layer not in (self.layers or ()):
            return stream.x
        added, gates = seq.plan(stream.x, image, layer)
        seq.memory["gates"] = {**seq.memory["gates"], layer: gates}
        return stream.x + (self.strength * added).to(stream.x.dtype)

    @staticmethod
    def gates(out: Any) -> Tensor:
        """The gates of the last prefill.

        Args:
            out: what a forward or `generate` returned inside `enhance`, or its KV cache.

        Returns:
            (B, decoder layers, vision layers) float32, in the order of the resolved method's
            `layers` and `vision_layers`; nan where a pair is not routed.

        Raises:
            FoveateError: where no CLI was at work.
        """
        kept = remembered(out, CLI)
        if kept is not None and kept[1].get("gates"):
            gates = kept[1]["gates"]
            return torch.stack([gates[layer].cpu() for layer in sorted(gates)], 1)
        raise FoveateError("There are no gates: this output holds no image seen by cli.")


def _used_layer(anatomy: Anatomy) -> int:
    """The vision layer that the model itself uses, counted from the tower's entry."""
    assert anatomy.tower is not None
    if len(anatomy.tower.used) > 1:
        raise FoveateError(
            "cli: this model concatenates several vision layers already, which the shared "
            "projector cannot take one by one: use a model with one vision_feature_layer."
        )
    return anatomy.tower.used[0]


def _base(anatomy: Anatomy) -> dict[str, Any]:
    """What has to be the same in a model that an injection serves."""
    assert anatomy.tower is not None
    return anatomy.shape | {
        "vision_model_type": anatomy.tower.kind,
        "vision_hidden_size": anatomy.tower.width,
        "vision_layers": anatomy.tower.depth,
    }
