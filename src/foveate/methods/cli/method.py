"""CLI: cross-layer injection (arXiv 2601.10710), the method that is trained.

A vision-language model sees the last layer of its vision tower, at the entry of its first decoder
layer. Here several vision layers are offered to several decoder layers, and what the decoder holds
decides how much of each it takes. `foveate train cli` learns it; the module is in `module`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ...core import Anatomy, FoveateError, Method, Sequences, Stream, Vision, costly, file
from ...core.sequence import remembered
from .module import KIND, CrossLayerInjection, Gates, Routes, Seen, Summaries, padded, place

SERVES = ("llava", "llava_next", "llava_onevision")
ITSELF = ("path", "seed", "strength")  # fields that are no settings of the module

KEPT = 4  # injections that stay loaded for a model


@dataclass(frozen=True)
class CLI(Method):
    """Cross-layer injection: decoder layers take from many vision layers, by a learnt gate.

    Vision layer k becomes ``V_k' = P(V_k) + alpha / rank * B_k A_k V_k``: the model's own projector
    P beside a low-rank path (AMP; reported). Entering decoder layer l, the residual stream of the
    image's tokens gets ``sum_k g_lk V_k'``, and other tokens get nothing. The gate g_lk compares a
    summary of V_k' with one of the hidden state, each by attention of a learnt query (AGF; the
    summaries are reported, the inside of the gate is inferred). All of it happens in the prefill;
    the vision states come from the ordinary forward, and tiles are packed as the model packs them.

    An answer never reaches the gate: in training the hidden summary sees the tokens before the
    first label. A prompt that holds earlier answers is summarised with them; train with
    summary="image" where conversations have several turns.

    Attributes:
        path: folder or hub name of a trained injection; its settings are then its own.
        seed: without a path, of a fresh one that has learnt nothing.
        vision_layers: of the tower, k is the output of block k - 1 (inferred; None: four, evenly
            spaced up to the one that the model itself uses, {6, 12, 18, 24} of SigLIP's).
        layers: decoder layers that take (inferred; None: every sixth, on shallower models every
            fourth part: {0, 6, 12, 18} of 24).
        rank, alpha: of the low-rank paths (inferred).
        gate: "scalar", a sigmoid per pair (inferred); "tanh"; "vector", per channel; "token", per
            visual token; "static", a learnt number that looks at nothing; "open", always 1.
        summary: what the hidden summary sees: "prompt", image and question; or "image", the
            image's tokens, so that questions can share a prefix (both inferred).
        routes: "many-to-many"; "one-to-one", static injection from early to late; "one-to-many",
            the last vision layer into all, as DeepStack does.
        heads, width: of the summaries' attention (inferred); smaller models get less.
        norm: of V_k' before it is added, "rms" or "none" (inferred).
        gate_norm: "rms" norms what a summary sees and what it says, "none" leaves both as they are
            (the reported equations). Hidden states have no bound, and a sigmoid of them may shut
            for good in training: then try "rms", or a lower rate.
        reduce: over vision layers, "sum" or "mean" (inferred).
        place: "before" the decoder layer's block or "after" it (inferred).
        share: one gate per decoder "layer" for all its vision layers, or one per "pair" (inferred).
        start: the gate's bias before training; sigmoid(-4) is 0.018 (inferred).
        strength: factor of what is added; 0 is the plain model. Not in the paper.
    """

    path: str = file()
    seed: int | None = costly(None, limit=None)  # a module is made, and has learnt nothing
    vision_layers: tuple[int, ...] | None = costly(None, limit=8)  # type: ignore[misc]
    rank: int = costly(64, limit=256)
    alpha: float = 128.0
    gate: Gates = "scalar"
    summary: Summaries = "prompt"
    routes: Routes = "many-to-many"
    heads: int = costly(8, limit=64)
    width: int = costly(256, limit=1024)
    norm: Literal["none", "rms"] = "none"
    gate_norm: Literal["none", "rms"] = "none"
    reduce: Literal["sum", "mean"] = "sum"
    place: Literal["before", "after"] = "before"
    share: Literal["layer", "pair"] = "layer"
    start: float = -4.0
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
        return (self._trained().get("summary") if self.path else self.summary) == "image"

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
        last = _used(anatomy)
        if self.path:
            found = self._fitting(anatomy)
        elif self.seed is None:
            raise FoveateError(
                "cli is trained: give path=FOLDER, which `foveate train cli` makes, or seed=0 for "
                "one that has learnt nothing."
            )
        else:
            depth = anatomy.depth
            found = dataclasses.replace(
                self,
                layers=self.layers
                if self.layers is not None
                else tuple(range(0, depth, min(6, max(1, depth // 4)))),
                vision_layers=self.vision_layers or self._spread(last),
            )
        blocks = tower.depth
        for k in found.vision_layers or ():
            if not 1 <= k <= blocks:
                raise FoveateError(
                    f"cli: vision layer {k} does not exist, this tower has layers 1 to {blocks}."
                )
        found = dataclasses.replace(
            found, vision_layers=tuple(sorted(set(found.vision_layers or ())))
        )
        resolved = Method.resolve(found, anatomy)
        assert isinstance(resolved, CLI)
        return resolved

    def _spread(self, last: int) -> tuple[int, ...]:
        if self.routes == "one-to-many":
            return (last,)
        return tuple(-(-last * i // 4) for i in range(1, 5))

    def _trained(self) -> dict[str, Any]:
        """config.json of the trained injection."""
        file = _file(self.path, "config.json")
        try:
            settings = _read(file, _stamp(file))
        except (OSError, ValueError) as error:
            raise FoveateError(
                f"cli: {self.path} has no readable config.json: give the folder that "
                "`foveate train cli` made, or its hub name."
            ) from error
        if not isinstance(settings, dict) or settings.get("kind") != KIND:
            raise FoveateError(f"cli: {self.path} is no {KIND}: its config.json says otherwise.")
        return settings

    def _fitting(self, anatomy: Anatomy) -> CLI:
        """With the settings of the trained injection, if it belongs to this model."""
        settings = self._trained()
        for name, value in _base(anatomy).items():
            own = settings["base"].get(name)
            if own != value:
                raise FoveateError(
                    f"cli: {self.path} belongs to another model: its {name} is {own}, this "
                    f"model's is {value}."
                )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name in ITSELF or field.name not in settings:
                continue
            trained, given = settings[field.name], getattr(self, field.name)
            trained = tuple(trained) if isinstance(trained, list) else trained
            if given not in (field.default, trained):
                raise FoveateError(
                    f"cli: {self.path} was trained with {field.name}={trained!r}: leave out "
                    f"{field.name}."
                )
            values[field.name] = trained
        return dataclasses.replace(self, **values)

    def build(self, anatomy: Anatomy) -> CrossLayerInjection:
        """A module for a model, float32 and on its device; `self` is resolved.

        Near identity where it is fresh: the low-rank paths start at 0, the gates almost closed.
        """
        assert anatomy.tower is not None
        if self.path:
            try:
                folder = _file(self.path, "model.safetensors").parent
                injection = CrossLayerInjection.from_pretrained(folder)
            except Exception as error:  # damaged files raise nearly anything
                reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
                raise FoveateError(f"cli: {self.path} could not be loaded: {reason}.") from error
        else:
            sizes = anatomy.tower.width, anatomy.width
            heads = min(self.heads, max(1, sizes[1] // 8))
            settings: dict[str, Any] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.parameters().items()
                if name not in ITSELF
            }
            settings |= {"heads": heads, "width": min(self.width, sizes[1]) // heads * heads}
            settings |= {"base": _base(anatomy), "vision_size": sizes[0], "text_size": sizes[1]}
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(self.seed or 0)
                injection = CrossLayerInjection(**settings)
        return injection.to(anatomy.tower.device)

    def setup(self, anatomy: Anatomy) -> CrossLayerInjection:
        """The module in the model's dtype, each part beside the layer that it serves."""
        stamp = None
        if self.path:
            try:
                stamp = _stamp(_file(self.path, "model.safetensors"))
            except OSError as error:
                raise FoveateError(
                    f"cli: {self.path} has no model.safetensors: give the folder that "
                    "`foveate train cli` made, or its hub name."
                ) from error
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

    def see(self, vision: Vision, seq: Sequences) -> None:
        """Bring the vision states to the language model, packed as its own."""
        if vision.video:
            raise FoveateError("cli follows images, not videos: leave out the video.")
        injection: CrossLayerInjection = seq.plan
        places, valid = place(vision.visual)
        total, features = int(valid.sum()), {}
        for k in map(int, injection.paths):

            def project(own: nn.Module, chosen: Tensor, k: int = k) -> Tensor:
                return injection.bring(own, k, chosen)

            packed = vision.pack(k, project)
            if len(packed) != total:
                raise FoveateError(
                    f"cli: the prompt has {total} image tokens and its images {len(packed)} "
                    "features: make the inputs with the model's own processor."
                )
            features[k] = padded(packed, valid)
        prompt = vision.visual if injection.summary == "image" else vision.mask.bool()
        if injection.summary == "prompt" and vision.labels is not None:
            prompt = prompt & ((vision.labels != -100).cumsum(1) == 0).to(prompt.device)
        seq.scratch["seen"] = Seen(features, places, valid, prompt)
        seq.memory["gates"] = {}

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        layer = stream.layer - (self.place == "after")
        seen: Seen | None = seq.scratch.get("seen")
        if seen is None or layer not in (self.layers or ()):
            return stream.x
        added, gates = seq.plan(stream.x, seen, layer)
        seq.memory["gates"] = {**seq.memory["gates"], layer: gates}
        return stream.plus(seen.places, self.strength * added)

    @staticmethod
    def gates(out: Any) -> Tensor:
        """The gates of the last prefill.

        Args:
            out: what a forward or `generate` returned inside `enhance`, or its KV cache.

        Returns:
            (B, decoder layers, vision layers) float32, in the order of the resolved method's
            `layers` and `vision_layers`; of gates per channel or token their mean; nan where a
            pair is not routed.

        Raises:
            FoveateError: where no CLI was at work.
        """
        kept = remembered(out, CLI)
        if kept is not None and kept[1].get("gates"):
            gates = kept[1]["gates"]
            return torch.stack([gates[layer].cpu() for layer in sorted(gates)], 1)
        raise FoveateError("There are no gates: this output holds no image seen by cli.")


def _used(anatomy: Anatomy) -> int:
    """The vision layer that the model itself uses, counted from the tower's entry."""
    assert anatomy.tower is not None
    if len(anatomy.tower.used) > 1:
        raise FoveateError(
            "cli: this model concatenates several vision layers already, which the shared "
            "projector cannot take one by one: use a model with one vision_feature_layer."
        )
    return anatomy.tower.used[0]


def _base(anatomy: Anatomy) -> dict[str, Any]:
    """What has to be the same in a model that an injection is to serve."""
    assert anatomy.tower is not None
    return anatomy.shape | {
        "vision_model_type": anatomy.tower.kind,
        "vision_hidden_size": anatomy.tower.width,
        "vision_layers": anatomy.tower.depth,
    }


def _file(path: str, name: str) -> Path:
    """A file of a folder or of a hub repository."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser() / name
    if path.count("/") != 1 or path[0] in "./~":
        raise FoveateError(f"cli: there is no folder {path!r}: `foveate train cli` makes one.")
    return _fetched(path) / name


@functools.cache  # the hub is asked once per process
def _fetched(path: str) -> Path:
    """The folder with both files of a hub repository, as one commit has them."""
    try:
        return Path(snapshot_download(path, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # no network, no such repository, ...: kinds vary
        raise FoveateError(
            f"cli: {path!r} is neither a folder nor to be had from the hub: check the name or the "
            "network."
        ) from error


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(32)
def _read(file: Path, stamp: tuple[int, int]) -> Any:
    """A JSON file as it was at `stamp`."""
    return json.loads(file.read_text(encoding="utf-8"))
