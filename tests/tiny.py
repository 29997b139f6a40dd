"""Tiny models of `tests.models` with real processors and a chat template, in memory or saved.

Families whose processors also take videos need torchvision and are left to tests that feed tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from foveate.vlm.vlm import VLM
from tests import models as families

WORDS = "<pad> <s> </s> <image> <unk> user assistant system : ? yes no Yes NO is there a cat red"
assert WORDS.split().index("yes") == families.FIRST_TEXT  # the model writes words from here on
SIDE = {"height": 16, "width": 16}


def template(image: str = "<image>") -> str:
    """Role, colon, a mark per picture, text; the start token comes from the tokenizer's name."""
    return (
        "{{ bos_token }}{% for turn in messages %}{{ turn.role + ' : ' }}"
        "{% for part in turn.content %}"
        f"{{{{ '{image} ' if part.type == 'image' else part.text + ' ' }}}}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )


def tokenizer(**special: str) -> tf.PreTrainedTokenizerFast:
    """Words, and for every other id of the model's vocabulary a made-up one."""
    words = WORDS.split()
    words += [f"w{i}" for i in range(len(words), families.VOCAB)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", **special},
        model_input_names=["input_ids", "attention_mask"],
    )


def image_processor(name: str) -> Any:
    """The class that needs no torchvision; early transformers 5 names it without `Pil`."""
    plain = f"{name}ImageProcessor"
    return getattr(tf, f"{plain}Pil", None) or getattr(tf, plain)


def llava(cls: Any = tf.LlavaProcessor, images: str = "CLIP", **layout: Any) -> tf.ProcessorMixin:
    return cls(
        image_processor(images)(size=SIDE, crop_size=SIDE, **layout),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(),
    )


def llava_next() -> tf.ProcessorMixin:
    pinpoints = families.PINPOINTS
    return llava(tf.LlavaNextProcessor, "LlavaNext", image_grid_pinpoints=pinpoints)


def gemma3() -> tf.ProcessorMixin:
    return tf.Gemma3Processor(
        image_processor("Gemma3")(size={"height": 24, "width": 24}),
        tokenizer(boi_token="w20", eoi_token="w21"),
        chat_template=template("w20"),
        image_seq_length=9,
    )


def idefics3() -> tf.ProcessorMixin:
    return tf.Idefics3Processor(
        image_processor("Idefics3")(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer(),
        image_seq_len=4,
        chat_template=template(),
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava_next": llava_next,
    "gemma3": gemma3,
    "idefics3": idefics3,
}


def vlm(family: str = "llava") -> VLM:
    processor = llava() if family == "llava" else PROCESSORS[family]()
    model = families.build(family, fresh=True)
    if len(processor.tokenizer) > families.VOCAB:  # Idefics3 brings words of its own
        with torch.random.fork_rng():  # new words are drawn
            torch.manual_seed(0)
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return VLM(model, processor, family)


def save(folder: Path) -> Path:
    """The tiny LLaVA as `save_pretrained` leaves it."""
    model = families.build("llava", fresh=True)
    model.generation_config = tf.GenerationConfig(pad_token_id=families.PAD)
    model.save_pretrained(folder)
    llava().save_pretrained(folder)
    return folder
