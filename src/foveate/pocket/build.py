"""Builds the pocket LLaVA: configuration, word-level tokenizer, processor, chat template.

    WEIGHTS: Path                                        # the folder with the trained model
    build_pocket(seed=0, **shape) -> (model, processor)  # untrained, fp32
    save_pocket(model, processor, folder)                # fp16 safetensors, loads as fp32
    load_pocket(folder=WEIGHTS) -> (model, processor)
    encode(processor, text) -> list[int]                 # a piece of a prompt, no <s> added

The saved folder is plain `transformers`: AutoModelForImageTextToText and AutoProcessor load it
without `foveate`. One image of any size is 144 visual tokens (96 pixels, patches of 8). Text is
lower-cased; `USER:` and `ASSISTANT:` are single tokens; line breaks count as spaces.
"""

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..backends.transformers.compat_parts import clip_image_processor, pocket_weights
from ..scenes import phrases
from ..scenes.lessons import PATCH, SIZE, VISUAL_TOKENS
from ..vlm.loading import WEIGHTS

MEAN, STD = [0.5, 0.5, 0.5], [0.27, 0.27, 0.27]
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
SPACE = "\u2581"  # marks a word that follows a space, as in SentencePiece
PUNCTUATION = ".,?!:;'\"()[]{}/-+*=&%$#@<>_|`~^\\"
# What methods and benchmarks say beyond the world's own questions, and everyday words
MORE_WORDS = Path(__file__).with_name("vocabulary.txt")
TEMPLATE = Path(__file__).parent / "weights" / "chat_template.jinja"
# Of the length of LLaVA's, and nearly in its words: 34 tokens
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant about things in the "
    "world. The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def vocabulary() -> list[str]:
    """Every token, special ones first; words stand with and without the space mark."""
    spoken = " ".join((*phrases.texts(), MORE_WORDS.read_text("utf-8"))).lower()
    words = dict.fromkeys(re.findall(r"[a-z]+", spoken))
    signs = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    marked = dict.fromkeys(SPACE + w for w in (*words, *signs, *PUNCTUATION))
    bare = dict.fromkeys((*PUNCTUATION, *signs))
    return [*SPECIAL, *ROLES, SPACE, *marked, *bare]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, lower-casing; an unlisted word becomes <unk>."""
    tokens = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            # "red,blue" is two words
            normalizers.Replace(Regex(r"(?<=[^a-z\s])(?=[a-z]{2})"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(rf"{SPACE}?[^a-z{SPACE}]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokens["<s>"])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[AddedToken("<image>", lstrip=True, rstrip=True, special=True)],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_tokens([AddedToken(r, lstrip=True, rstrip=True, normalized=False) for r in ROLES])
    return wrapped


def build_processor(system: str = "") -> LlavaProcessor:
    """Squashes any image to 96 x 96 pixels; puts 144 <image> tokens per image into the text.

    Args:
        system: what chats begin with that bring no system prompt of their own.
    """
    template = TEMPLATE.read_text("utf-8")
    if system:
        absent = "{%- if messages[0]['role'] != 'system' -%}"
        template = f"{absent}{system} {{% endif -%}}\n{template}"
    image_processor = clip_image_processor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build_pocket(
    seed: int = 0,
    *,
    vision_layers: int = 6,
    vision_width: int = 192,
    text_layers: int = 12,
    text_width: int = 192,
    system: str = "",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model (fp32, eval mode) and its processor; heads are 32 wide."""
    processor = build_processor(system)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_width // 32,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    heads = text_width // 32
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=text_width * 8 // 3,
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def encode(processor: Any, text: str) -> list[int]:
    """Token ids of a piece of a prompt, without the leading <s>."""
    return list(processor.tokenizer.encode(text, add_special_tokens=False))


def save_pocket(model: LlavaForConditionalGeneration, processor: Any, folder: Path | str) -> None:
    """Write weights as fp16 (they load as fp32), configuration, tokenizer and processor."""
    folder = Path(folder)
    half = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_pocket(folder: Path | str = WEIGHTS) -> tuple[LlavaForConditionalGeneration, Any]:
    """The saved model (fp32, eval mode) and its processor, through plain transformers."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, **pocket_weights()
    )
    return model.eval(), AutoProcessor.from_pretrained(folder)
