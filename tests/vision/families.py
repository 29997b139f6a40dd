"""Real image and video processors with made tokenizers, on tiny random models of their families.

    model = vlm("qwen3_vl")          # a `VLM`, weights as `tests.models.build` draws them
    model.ask(picture(40, 30), "Is there a cat?", "clvs")

A family here is the processor class that its checkpoints use. Its pictures and videos are cut into
the patches and tiles of the tiny model. Its tokenizer knows words, digits, line breaks and marks,
and has the family's special tokens. Its chat template writes turns as the family does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from foveate.vlm.vlm import VLM
from tests import models as tiny
from tests import newer

assert newer.FAMILIES

WORDS = (
    "yes no Yes No user assistant system is there a cat red Is What in the picture video frame "
    "Describe this image Answer using single word or phrase Write general description of model "
    "Frame s seconds Here original and here are some crops to help you see better "
    "\n \n\n . , : ? < > / - ' ! 0 1 2 3 4 5 6 7 8 9"
)
PIECES = r"\n+|\d|[A-Za-z]+|[^\w\s]"

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of drawn noise in blocks, so that it is not grey once it has been made small."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 255, (min(height, 8), min(width, 8), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def film(frames: int, width: int, height: int) -> list[Image.Image]:
    return [picture(width, height, seed) for seed in range(frames)]


def written(image: str, video: str = "", template: str = CHATML) -> str:
    return template.replace("IMAGE", image).replace("VIDEO", video)


def tokenizer(names: dict[int, str], more: tuple[str, ...] = (), **special: str) -> Any:
    """Special tokens at the ids that the tiny models know, then words, then made-up ones.

    Args:
        names: id -> the token there, of those below `FIRST_TEXT`.
        more: further tokens that text is cut at; those that the vocabulary lacks get new ids.
        special: what the processor asks its tokenizer for, by attribute.
    """
    listed = [names.get(i, f"<|{i}|>") for i in range(tiny.FIRST_TEXT)]
    split = [word.strip(" ") for word in WORDS.split(" ")]
    listed += list(dict.fromkeys(split))
    listed += [f"w{i}" for i in range(len(listed), tiny.VOCAB - 1)] + ["<unk>"]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    bare.add_special_tokens(listed[: tiny.FIRST_TEXT] + list(more))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        pad_token=names[tiny.PAD],
        bos_token=names.get(tiny.BOS),
        eos_token=names[tiny.EOS],
        extra_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
    )


QWEN = {
    tiny.PAD: "<|endoftext|>",
    tiny.EOS: "<|im_end|>",
    tiny.IMAGE: "<|image_pad|>",
    tiny.START: "<|vision_start|>",
    tiny.END: "<|vision_end|>",
    tiny.BREAK: "<|im_start|>",
    tiny.VIDEO: "<|video_pad|>",
}
CELL = 8  # pixels of a Qwen token's side: patches of 4, merged 2 x 2
AREA = {"shortest_edge": 4 * CELL**2, "longest_edge": 64 * CELL**2}


def _qwen(processor: Any, films: Any) -> Any:
    mark = "<|vision_start|>{}<|vision_end|>"
    return processor(
        tf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=AREA),
        tokenizer(QWEN),
        films(patch_size=4, merge_size=2, size=AREA),
        chat_template=written(mark.format("<|image_pad|>"), mark.format("<|video_pad|>")),
    )


def qwen2_5_vl() -> Any:
    return _qwen(tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor)


def qwen3_vl() -> Any:
    return _qwen(tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor)


def qwen3_5() -> Any:
    """Its checkpoints name Qwen3-VL's processor."""
    return qwen3_vl()


def internvl() -> Any:
    names = {
        tiny.PAD: "<|endoftext|>",
        tiny.EOS: "<|im_end|>",
        tiny.IMAGE: "<IMG_CONTEXT>",
        tiny.START: "<img>",
        tiny.END: "</img>",
        tiny.BREAK: "<|im_start|>",
        tiny.VIDEO: "<video>",
    }
    asked = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"height": 16, "width": 16}
    return tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer(names, **asked),
        tf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=written("<IMG_CONTEXT>\n", "<video>\n"),
    )


def llava_onevision() -> Any:
    names = QWEN | {tiny.IMAGE: "<image>", tiny.VIDEO: "<video>"}
    size = {"height": 16, "width": 16}
    return tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiny.PINPOINTS),
        tokenizer(names),
        tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=written("<image>\n", "<video>\n"),
    )


IDEFICS = """\
<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}\
{% if part.type == 'image' %}<image>{% elif part.type == 'video' %}<video>\
{% else %} {{ part.text }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def _idefics(processor: Any, images: Any, **films: Any) -> Any:
    names = {
        tiny.PAD: "<|pad|>",
        tiny.BOS: "<|im_start|>",
        tiny.EOS: "<end_of_utterance>",
        tiny.IMAGE: "<image>",
        tiny.START: "<fake_token_around_image>",
        tiny.END: "<global-img>",
        tiny.VIDEO: "<video>",
    }
    places = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
    return processor(
        images(size={"longest_edge": 48}, max_image_size={"longest_edge": 16}),
        tokenizer(names, places),
        image_seq_len=4,
        chat_template=IDEFICS,
        **films,
    )


def smolvlm() -> Any:
    return _idefics(
        tf.SmolVLMProcessor,
        tf.SmolVLMImageProcessor,
        video_processor=tf.SmolVLMVideoProcessor(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, fps=1, num_frames=8
        ),
    )


def idefics3() -> Any:
    return _idefics(tf.Idefics3Processor, tf.Idefics3ImageProcessor)


GEMMA = """\
<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}
{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def gemma3() -> Any:
    names = {
        tiny.PAD: "<pad>",
        tiny.BOS: "<bos>",
        tiny.EOS: "<end_of_turn>",
        tiny.IMAGE: "<image_soft_token>",
        tiny.START: "<start_of_image>",
        tiny.END: "<end_of_image>",
        tiny.BREAK: "<start_of_turn>",
    }
    asked = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    return tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size={"height": 24, "width": 24}),
        tokenizer(names, ("\n", "\n\n"), **asked),  # which Gemma's tokenizer has among such
        image_seq_length=9,
        chat_template=GEMMA,
    )


GLM = """\
[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{% for part in m.content %}{% if part.type == 'image' %}\
<|begin_of_image|><|image|><|end_of_image|>{% elif part.type == 'video' %}\
<|begin_of_video|><|video|><|end_of_video|>{% else %}{{ part.text }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def glm4v() -> Any:
    names = {
        tiny.PAD: "<|endoftext|>",
        tiny.EOS: "<|user|>",
        tiny.IMAGE: "<|image|>",
        tiny.START: "<|begin_of_image|>",
        tiny.END: "<|end_of_image|>",
        tiny.BREAK: "<|assistant|>",
        tiny.VIDEO: "<|video|>",
        8: "<|begin_of_video|>",
        9: "<|end_of_video|>",
    }
    return tf.Glm4vProcessor(
        tf.Glm4vImageProcessor(patch_size=4, merge_size=2, size=AREA),
        tokenizer(names, ("[gMASK]", "<sop>", "<|system|>")),
        tf.Glm4vVideoProcessor(patch_size=4, merge_size=2, size=AREA),
        chat_template=GLM,
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        qwen2_5_vl,
        qwen3_vl,
        qwen3_5,
        internvl,
        llava_onevision,
        smolvlm,
        idefics3,
        gemma3,
        glm4v,
    )
}


@functools.cache
def vlm(family: str) -> VLM:
    """The model of a family with its processor, one for all tests of a process."""
    processor = PROCESSORS[family]()
    model = tiny.build(family, fresh=True)
    if len(processor.tokenizer) > tiny.VOCAB:
        with torch.random.fork_rng():  # rows of new words are drawn
            torch.manual_seed(0)
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return VLM(model, processor, family)
