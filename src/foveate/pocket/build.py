"""Builds the pocket LLaVA: configuration, word-level tokenizer, processor, chat template.

    WEIGHTS: Path                                        # the folder with the trained model
    build_pocket(seed=0, **shape) -> (model, processor)  # untrained, fp32
    save_pocket(model, processor, folder)                # fp16 safetensors, loads as fp32
    load_pocket(folder=WEIGHTS) -> (model, processor)
    load_open(folder=WEIGHTS) -> (model, processor)      # as it was before yes/no training
    encode(processor, text) -> list[int]                 # a piece of a prompt, no <s> added

The saved folder is plain `transformers`: AutoModelForImageTextToText and AutoProcessor load it
without `foveate`. One image of any size is 144 visual tokens (96 pixels, patches of 8). Text is
lower-cased; `USER:` and `ASSISTANT:` are single tokens; line breaks count as spaces.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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

from ..backends.transformers.compat import clip_image_processor, is_tower_weight, pocket_weights
from ..scenes import questions
from ..vlm.loading import WEIGHTS

SIZE, PATCH = 96, 8
VISUAL_TOKENS = (SIZE // PATCH) ** 2
MEAN, STD = [0.5, 0.5, 0.5], [0.27, 0.27, 0.27]
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
SPACE = "\u2581"  # marks a word that follows a space, as in SentencePiece

# What methods and benchmarks say beyond the world's own questions
INSTRUCTIONS = (
    "Write a general description of the image. Answer the question using a single word or phrase.",
    "Describe this image. Please describe this image in detail. Please describe the image.",
    "Provide a comprehensive overview of the image. What do you see in this image?",
    "Explain what appears in the image. What is in the image? What is shown in this image?",
    "Please answer yes or no. Please just answer yes or no. Answer yes or no. Yes, No.",
    "Please answer this question with one word. Answer with the option's letter from the given"
    " choices directly. Given the image, answer the following question.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the human's questions.",
    "You are a helpful assistant. Carefully look at the picture and think step by step.",
    "Is there direct contact between the person and the table? Does the person wear a hat?"
    " Is the sky sunny in this image? Is the dog behind, in front of, next to, near the chair?",
    "To answer the question, where should we look in the image? Focus on the region. Crop, zoom.",
    "There is no. It is not. I do not know. This is an image of a photo, drawing or painting.",
    "The image shows. In the image, there are several. Overall, the scene. The background is.",
)
EVERYDAY = """
person bicycle motorcycle airplane bus train truck traffic light fire hydrant stop sign parking
meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack handbag tie suitcase
frisbee skis snowboard sports baseball bat glove skateboard surfboard tennis racket bottle wine
glass fork knife spoon bowl banana apple sandwich orange broccoli carrot hot pizza donut cake chair
couch potted plant bed dining table toilet tv laptop mouse remote keyboard cell phone microwave oven
toaster sink refrigerator vase scissors teddy hair drier toothbrush man woman boy girl child people
men women children baby face head hand hands eye eyes nose mouth arm leg foot feet body shirt shoes
coat dress glasses bag box door window wall floor roof room kitchen road street bridge city field
grass hill mountain river lake sea ocean beach sand sky water rain snow ice wind storm night day
morning evening summer winter leaf leaves branch bush garden forest rock stone wood metal paper
plastic grey gray black white gold silver dark bright light tall short long wide narrow big little
tiny huge old new young clean dirty wet dry open closed empty full round square flat sharp soft hard
happy sad angry asleep awake standing sitting lying walking running jumping flying swimming riding
driving eating drinking holding wearing carrying looking playing working sleeping reading writing
throwing catching hitting kicking pulling pushing touching leaning hanging floating growing cooking
talking smiling cloudy sunny rainy foggy number word name text letter letters digits digit title
brand sign logo line corner edge middle center centre background foreground part whole pair group
set kind type shape circle triangle rectangle object objects thing things item items animal animals
vehicle food drink fruit vegetable furniture tool toy game ball picture photo image drawing painting
scene region crop view side front back inside outside behind under underneath between among around
through across against toward towards along beside near far away close next over off onto into up
down here there everywhere somewhere first second third last other another same different similar
both each every all some any none many much more most few less least only also too very quite rather
almost about exactly just even still already yet never always often sometimes now then again later
before after while when where why how who whom whose which what that this these those it its he she
they them their his her him we us our you your me my i am is are was were be been being have has had
do does did done can could will would shall should may might must not no yes and or but nor so if
because as than with without within for from by at on of to in out please thanks thank hello hi ok
okay sure sorry maybe perhaps correct incorrect true false right wrong answer answers question
questions reason explain tell show shows showing shown see sees seen saw find finds found get gets
give gives given go goes gone come comes make makes made take takes taken put puts use uses used
using want wants need needs like likes look looks know knows known think thinks say says said ask
asks describe describes described list count compare contains contain contained visible present
appears appear appearing missing located placed printed colored coloured colour colours colors color
size sizes pattern patterns large larger largest small smaller smallest higher highest lower lowest
bigger biggest closer closest left right above below top bottom upper half halves relative position
eight nine ten eleven twelve zero one two three four five six seven hundred thousand once twice
time times year years hour hours minute minutes today yesterday tomorrow world life home work school
bathroom bedroom office shop store market restaurant station airport farm park playground party
music movie computer phone camera screen button machine engine wheel wheels wing wings tail paw fur
feather horn tooth teeth bone skin blood heart brain doctor teacher student player driver worker
police soldier king queen family friend friends mother father sister brother son daughter wife
husband dinner lunch breakfast bread cheese milk tea coffee juice sugar salt meat rice soup egg eggs
moon planet earth space rainbow cloud clouds bridge tower castle church building buildings tent
ship plane rocket wagon cart sled anchor sail rope net basket bucket candle mirror pillow blanket
curtain carpet shelf drawer cabinet lock pen pencil brush card flag map letter envelope gift
balloon drum guitar piano violin trumpet bell whistle ring crown necklace watch belt pocket boot
sock scarf jacket sweater skirt pants jeans striped dotted plain spotted checked plaid stripe
stripes dot dots spot spots single phrase option options choice choices direct directly contact
"""
PUNCTUATION = ".,?!:;'\"()[]{}/-+*=&%$#@<>_|`~^\\"

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}ASSISTANT: {% elif message['role'] == 'user' -%}USER: \
{% endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{% generation %}</s>{% endgeneration %}\
{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


def vocabulary() -> list[str]:
    """Every token, special ones first; words stand with and without the space mark."""
    spoken = " ".join((*questions.texts(), *INSTRUCTIONS, EVERYDAY)).lower()
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
            normalizers.Replace(
                Regex(r"(?<=[^a-z\s])(?=[a-z]{2})"), " "
            ),  # "red,blue" is two words
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


def build_processor() -> LlavaProcessor:
    """Squashes any image to 96 x 96 pixels; puts 144 <image> tokens per image into the text."""
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
        chat_template=TEMPLATE,
    )


def build_pocket(
    seed: int = 0,
    *,
    vision_layers: int = 6,
    vision_width: int = 192,
    text_layers: int = 12,
    text_width: int = 192,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model (fp32, eval mode) and its processor; heads are 32 wide."""
    processor = build_processor()
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


OPEN = "open.safetensors"  # beside the model: what differs before yes/no training


def save_open(state: dict[str, torch.Tensor], folder: Path | str) -> None:
    """Keep an earlier state's projector and language model as fp16; the tower is the same."""
    kept = {
        k: v.half().contiguous()
        for k, v in state.items()
        if not is_tower_weight(k) and k != "lm_head.weight"
    }
    save_file(kept, Path(folder) / OPEN)


def load_open(folder: Path | str = WEIGHTS) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model after captions and open questions, which further training starts from."""
    model, processor = load_pocket(folder)
    found = model.load_state_dict(load_file(Path(folder) / OPEN), strict=False)
    assert not found.unexpected_keys
    return model, processor
