"""The tiny LLaVA of `tests.models` with a processor and chat template, in memory or as a folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from foveate.vlm import VLM
from tests import models as families

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role + ' : ' }}{% for part in turn.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = "<pad> <s> </s> <image> <unk> yes no Yes NO user assistant system : ? is there a cat red"


def processor() -> LlavaProcessor:
    """Words, and for every other id of the model's vocabulary a made-up one."""
    words = WORDS.split()
    words += [f"w{i}" for i in range(len(words), families.VOCAB)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def vlm() -> VLM:
    return VLM(families.build("llava", fresh=True), processor(), "tiny")


def save(folder: Path) -> Path:
    """The whole as `save_pretrained` leaves it."""
    model = families.build("llava", fresh=True)
    model.generation_config = GenerationConfig(pad_token_id=families.PAD)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
