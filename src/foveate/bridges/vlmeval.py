"""VLMEvalKit runs its data sets on any model and method of foveate.

VLMEvalKit has no plug-ins. A script adds the model to its table and starts its ``run.py``:

    from functools import partial
    from vlmeval.config import supported_VLM
    from foveate.bridges.vlmeval import Foveate

    supported_VLM["llava-clvs"] = partial(Foveate, "llava-hf/llava-1.5-7b-hf", "clvs")
    from vlmeval.run import main
    main()                                  # --data POPE --model llava-clvs

Run with nvidia-vlmeval 26.3 on transformers 5.24. It needs torchvision and decord.
"""

from __future__ import annotations

from typing import Any

from vlmeval.vlm.base import BaseModel

from ..base.errors import FoveateError
from ..vlm.vlm import VLM, Methods


class Foveate(BaseModel):
    """A vision-language model with a method; answers are greedy.

    Args:
        pretrained: "pocket", a folder of `save_pretrained` or a hub model.
        method: text form of one method or several, such as ``clvs(smoothing=0.7)``.
        max_new_tokens: limit of every answer. options: `dtype`, `device` and others of `VLM.load`.
    """

    INTERLEAVE = True  # messages come whole, with all their pictures

    def __init__(
        self,
        pretrained: str = "pocket",
        method: Methods = None,
        max_new_tokens: int = 512,
        **options: Any,
    ) -> None:
        super().__init__()
        self.vlm = VLM.load(pretrained, **options)
        self.method, self.max_new_tokens = method, max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of pictures (paths) and then texts."""
        kinds = [part["type"] for part in message]
        pictures = [part["value"] for part in message if part["type"] == "image"]
        if "image" in kinds[len(pictures) :]:
            raise FoveateError(
                f"A question of {dataset} has a picture after text, and foveate takes pictures "
                "first: leave this data set out."
            )
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        answer = self.vlm.ask(pictures, text, self.method, max_new_tokens=self.max_new_tokens)
        return answer.text
