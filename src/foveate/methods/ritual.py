"""RITUAL: a second, randomly changed look at the picture adds to the first (arXiv 2405.17821).

What the model still says about the picture when it is mirrored, turned, recoloured, blurred or cut
is more likely to be there. So the logits of a changed picture are added, not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, randint

from ..base.perturb import own_generator, registry
from ..core import FoveateError, Method, Prompt, Sequences, together

SIX = ("flip", "flip(axis='vertical')", "rotate", "jitter", "blur", "crop")
"""The published transforms, as perturbations."""


@dataclass(frozen=True)
class RITUAL(Method):
    """Random transforms of the picture as a complement: l + alpha l'.

    A second stream reads the same tokens beside a changed picture. Its logits l' are added to the
    true l, l + alpha l', on tokens with at least `beta` times the probability of the likeliest;
    the rest get -inf. This happens in the prompt and at every decode step, before processors and
    warpers. Attention is untouched.

    Each picture gets one of six transforms, each as likely: horizontal flip; vertical flip;
    rotation by -180 to 180 degrees, corners black; brightness, contrast and saturation times 0 to
    2 and hue shifted by up to half a circle, in random order; Gaussian blur of 13 pixels, sigma
    1.5 to 2; a crop of 8 to 100 % of the area, ratio 3/4 to 4/3. They happen on the picture itself,
    before the processor. The crop is resized to 336 x 336 for LLaVA-1.5, as published, and for
    other models to the picture's own size, so that the number of tokens stays (inferred).

    Random numbers come from a generator of each picture's own, started with `seed` and the
    picture's content (inferred, the authors draw from the global one): the same picture always
    changes in the same way, whatever else is in the batch, and other pictures in other ways.
    ``notes["transform"]`` names the transform of each picture. Questions about one image share the
    prefix of both streams.

    Attributes:
        alpha: strength of the second stream, 0 or more; 0 leaves only the plausibility cut.
            Published: 3.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Published: 0.1.
        transform: "random" for one of the six, or a perturbation for all pictures, such as
            "rotate", "flip(axis='vertical')", "identity" or one's own.
        seed: of every picture's generator, 0 or more; inferred.
    """

    alpha: float = 3.0
    beta: float = 0.1
    transform: str = "random"
    seed: int = 0

    name: ClassVar[str] = "ritual"
    paper: ClassVar[str] = "2405.17821"
    needs_pixels: ClassVar[bool] = True
    passes: ClassVar[str] = "every token once more, in one batch"
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"beta": 0.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(self.seed >= 0, "seed must be 0 or more")
        if self.transform != "random":
            registry.parse(self.transform)

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage == "logits" or self.alpha != 0)

    # -- the changed picture -----------------------------------------------------------------------

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        from ..vlm.look import fixed_square

        if not chats[0].images:
            return chats
        side = 336 if fixed_square(vlm) else None
        changed = [self.changed(image, side) for image in chats[0].images]
        for image, (other, name) in zip(chats[0].images, changed, strict=True):
            self.require(
                side is not None or other.size == image.size,
                f"{name} gives a picture of another size, on which this model's number of image "
                "tokens depends: choose a transform that keeps the size",
            )
        contrast = [image for image, _ in changed]  # one list of pictures: they share a prefix
        names = [name for _, name in changed]
        return [
            replace(chat, contrast=contrast, notes={**chat.notes, "transform": names})
            for chat in chats
        ]

    def changed(self, image: Image.Image, side: int | None = None) -> tuple[Image.Image, str]:
        """A picture after its transform, and the transform's text form.

        Args:
            side: of the square that a random crop is resized to; None: the picture's size.
        """
        generator, name = own_generator(image, self.seed), self.transform
        if name == "random":
            name = SIX[int(randint(len(SIX), (1,), generator=generator))]
        for one in registry.parse(name):
            if one.name == "crop" and one.side is None:
                one = replace(one, side=side)
            image = one(image, generator)
        return image, name

    # -- the second stream -------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        if prompt.given is None:
            raise FoveateError(
                "ritual changes the picture before the processor, and this prompt came without a "
                "changed one: use VLM.load(...).ask(image, question, method=...)."
            )
        return prompt.given

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        return together(other, logits, self.alpha, self.beta)
