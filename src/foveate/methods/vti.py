"""VTI: visual and textual intervention (arXiv 2410.15778).

Two directions are found once per model: from hallucinated captions to true ones in the language
model, and towards states that do not hang on single patches in the vision tower. Every feed-forward
is then turned along them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file
from torch import Tensor

from ..base.artifact import DIRECTIONS, Artifact, check_model, read_config, weights_stamp
from ..core import Anatomy, FeedForward, FoveateError, Method, Sequences, file, turned

POCKET = Path(__file__).parent.parent / "pocket" / "directions"
STEP = 0.1  # fixed in the authors' layer


@dataclass(frozen=True)
class VTI(Method):
    """Intervention along fixed directions, in every feed-forward of decoder and vision tower.

    What a feed-forward of the decoder returns keeps its norm and is turned, in every row of the
    prompt and at every decode step; text_l is the direction of layer l:

        x <- |x| n(n(x) + 0.1 alpha_text n(text_l)),   n(x) = x / |x|

    In the vision tower it is the same with alpha_image, in every block and for every token, a
    classification token included, each with a direction of its own. It needs no image, and the
    question does not change image rows.

    `foveate directions MODEL` makes the directions: see `foveate.insight.directions`.

    Attributes:
        alpha_text: strength in the decoder, any number; 0 leaves it alone, below 0 it turns away.
            The authors' script: 0.8, their README: 0.9.
        alpha_image: strength in the vision tower, any number; 0 leaves it alone. The authors'
            script: 0, their README: 0.9.
        path: what `foveate directions` made, a folder or the name of a hub repository; or one
            safetensors file with ``text`` (L, D) and, for the tower, ``image`` (L_v, T_v, D_v).
            Empty: the directions that come with the pocket model.
        layers: decoder layers that are turned. None: all.
    """

    alpha_text: float = 0.8
    alpha_image: float = 0.0
    path: str = file()

    name: ClassVar[str] = "vti"
    paper: ClassVar[str] = "2410.15778"
    rows: ClassVar = "all"
    needs_image: ClassVar[bool] = False
    passes: ClassVar[str] = "none; needs directions, made once per model"
    neutral: ClassVar[dict[str, Any]] = {"alpha_text": 0.0, "alpha_image": 0.0}
    example: ClassVar[dict[str, Any]] = {"alpha_text": 6.0}

    def wants(self, stage: str) -> bool:
        idle = {"mlp": self.alpha_text == 0, "tower": self.alpha_image == 0}
        return super().wants(stage) and not idle.get(stage, False)

    def resolve(self, anatomy: Anatomy) -> Method:
        """The same method, if its directions are there and those of this model.

        Raises:
            FoveateError: else.
        """
        path, found = self._found(anatomy)
        wanted = {"text": self.alpha_text != 0, "image": self.alpha_image != 0}
        if wanted["image"] and anatomy.plain_tower is None:
            raise FoveateError(
                f"vti cannot steer the vision tower of {anatomy.kind}, whose blocks are not known: "
                "leave out alpha_image."
            )
        tower = anatomy.plain_tower
        sizes = {
            "text": (anatomy.depth, anatomy.width),
            "image": (tower.depth, None, tower.width) if tower else (),
        }
        for name in (name for name, want in wanted.items() if want):
            if name not in found:
                raise FoveateError(
                    f"{path} holds no {name} directions: make them with `foveate directions "
                    f"MODEL`, or set alpha_{name}=0."
                )
            shape, size = tuple(found[name].shape), sizes[name]
            alike = len(shape) == len(size) and all(
                b in (None, a) for a, b in zip(shape, size, strict=True)
            )
            if not alike:
                described = ", ".join("tokens" if n is None else str(n) for n in size)
                raise FoveateError(
                    f"{path} belongs to another model: its {name} is {shape}, this model needs "
                    f"({described}). Make one for this model with `foveate directions MODEL`."
                )
        return Method.resolve(dataclasses.replace(self, path=str(path)), anatomy)

    def _found(self, anatomy: Anatomy) -> tuple[Path | str, Mapping[str, Tensor]]:
        """Where the directions are, and they themselves."""
        path: Path | str = self.path
        if not path:
            path, shape = POCKET, anatomy.shape
            if read_config(POCKET, DIRECTIONS)["model"] != shape:
                raise FoveateError(
                    f"vti has no directions for this model ({shape['model_type']}, "
                    f"{shape['layers']} layers): make them with `foveate directions MODEL` and "
                    "name the folder it writes, as in vti(path='FOLDER')."
                )
        if (plain := Path(path).expanduser()).is_file():
            return path, _plain(plain, plain.stat().st_mtime_ns)
        check_model(path, DIRECTIONS, anatomy.shape)
        return path, _kept(str(path), weights_stamp(path, DIRECTIONS))

    def setup(self, anatomy: Anatomy) -> dict[tuple[str, int], Tensor]:
        """(text or image, layer or block) -> its direction, float32, where it is used."""
        _, found = self._found(anatomy)
        plan = {}
        for layer in self.mlp_layers if self.wants("mlp") else ():
            plan["text", layer] = found["text"][layer].float().to(anatomy.layer_device(layer))
        if self.wants("tower"):
            assert anatomy.tower is not None
            for block, direction in enumerate(found["image"]):
                plan["image", block] = direction.float().to(anatomy.tower.device)
        return plan

    def mlp(self, fed: FeedForward, seq: Sequences) -> Tensor:
        direction = seq.plan["text", fed.layer].to(fed.out.device)
        return turned(fed.out, direction, STEP * self.alpha_text).to(fed.out.dtype)

    def tower(self, fed: FeedForward, seq: Sequences) -> Tensor:
        direction = seq.plan["image", fed.layer].to(fed.out.device)
        if fed.out.dim() != 3 or fed.out.shape[1] != len(direction):
            raise FoveateError(
                f"vti has directions for {len(direction)} tokens of an image, and the tower reads "
                f"states {tuple(fed.out.shape)}: use it with images of one size, or leave out "
                "alpha_image."
            )
        return turned(fed.out, direction, STEP * self.alpha_image).to(fed.out.dtype)


@functools.lru_cache(2)
def _kept(path: str, stamp: tuple[int, int]) -> Mapping[str, Tensor]:
    """The tensors of an artifact as it was at `stamp`."""
    return Artifact.from_pretrained(path, DIRECTIONS).tensors


@functools.lru_cache(2)
def _plain(path: Path, stamp: int) -> Mapping[str, Tensor]:
    """The directions of a safetensors file as it was at `stamp`."""
    try:
        found = load_file(path)
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(str(error).split()).rstrip(".")
        raise FoveateError(
            f"{path} is no safetensors file ({reason}): make one with `foveate directions MODEL`."
        ) from error
    return {name: tensor for name, tensor in found.items() if name in ("text", "image")}
