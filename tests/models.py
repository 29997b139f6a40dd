"""Tiny random vision-language models of every family, built in memory, and inputs for them.

    model = build("qwen2_5_vl")                     # shared by the process; fresh=True: your own
    batch = inputs("qwen2_5_vl", "image", batch=3)  # left-padded, images at different positions
    alone = inputs("qwen2_5_vl", "image", row=1)    # the second prompt of that batch by itself
    model(**batch); model.generate(**batch)

A new family is one builder: a function returning a ``Family``, marked ``@family``. Nothing else
names families. Weights are drawn wide enough that attention is far from uniform, so that a mistake
of one column or one position shows in the logits.

Kinds of prompts (three rows each, see ``KINDS``): ``image`` (a picture, text before it and a
question after), ``images`` (two pictures with text between), ``text`` (no picture), ``mixed``
(one, none and two pictures), ``prefix`` and ``suffix`` (the two halves of ``image``), ``shared``
(prefix 0 followed by suffix i).

In plain transformers 5.23 every row of a padded batch equals its single run (fp32, below 1e-5),
but Qwen keeps ``rope_deltas`` on the model between calls: a hand-written cached loop over a text
prompt is wrong after a picture prompt, and a cached step given ``attention_mask`` without
``position_ids`` raises. ``generate`` is right. Two Qwen pictures need a token between them, or
their positions are counted as one. LLaVA-OneVision tiles a picture only where it is alone in its
prompt, and says so through ``batch_num_images``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import AutoConfig

from foveate.backends.transformers import compat
from foveate.core import Prompt

VOCAB, PAD, BOS, EOS, IMAGE, START, END, BREAK, VIDEO = 200, 0, 1, 2, 3, 4, 5, 6, 7
FIRST_TEXT = 10

PREFIX: list[list[int | str]] = [[3, "wide"], [7, "tall"], [1, "square"]]
SUFFIX: list[list[int | str]] = [[5], [8], [2]]
# A prompt is a list of pieces: n = n text tokens (the same n is the same text), a word = a picture.
KINDS: dict[str, list[list[int | str]]] = {
    "image": [before + after for before, after in zip(PREFIX, SUFFIX, strict=True)],
    "images": [[2, "wide", 4, "tall", 6], [5, "square", 1, "wide", 3], [1, "tall", 9, "square", 5]],
    "text": [[12], [17], [9]],
    "mixed": [[4, "wide", 3], [13], [2, "square", 3, "tall", 5]],
    "prefix": PREFIX,
    "suffix": SUFFIX,
    "shared": [PREFIX[0] + after for after in SUFFIX],
}
# height and width of a picture, in units of half a vision tower's input
SHAPES = {"square": (2, 2), "wide": (2, 4), "tall": (4, 2)}


@dataclass
class Family:
    """A model class with its tiny config, and how a picture becomes tensors and tokens."""

    cls: type[tf.PreTrainedModel]
    config: tf.PreTrainedConfig
    picture: Callable[[str, bool], dict[str, Tensor]]  # (shape, alone in its prompt) -> tensors
    layout: Callable[[int, str], list[int]] = lambda n, shape: [IMAGE] * n
    type_ids: str | None = None  # name of the input that marks picture tokens
    marked_as: int = 1  # what it holds there, and 0 elsewhere
    per_row: bool = False  # pictures of a prompt are stacked into (1, pictures, ...)
    join: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] | None = None  # of pictures
    counts: bool = False  # wants batch_num_images


FAMILIES: dict[str, Callable[[], Family]] = {}


def family(builder: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[builder.__name__] = functools.cache(builder)
    return builder


def as_inputs(prompt: Prompt) -> dict[str, Any]:
    """A `Prompt` as model inputs."""
    tokens = {"input_ids": prompt.ids, "inputs_embeds": prompt.embeds}
    given = {k: v for k, v in tokens.items() if v is not None}
    return given | {"attention_mask": prompt.mask} | prompt.pixels | prompt.inputs


def build(name: str, fresh: bool = False, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The model of a family, in eval mode. Equal weights every time; ``fresh`` shares nothing."""
    if fresh or dtype != torch.float32:
        return _cast(_make(name), dtype)
    model = _shared(name)
    model.set_attn_implementation("sdpa")  # whatever an earlier test left
    return model


def _make(name: str) -> tf.PreTrainedModel:
    spec = FAMILIES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(spec.cls(type(spec.config).from_dict(spec.config.to_dict())))


_shared = functools.cache(_make)


def _cast(model: tf.PreTrainedModel, dtype: torch.dtype) -> tf.PreTrainedModel:
    """The model in another precision; torch would drop the imaginary part of complex buffers."""
    turns = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_complex()
    ]
    for module, name, _ in turns:
        setattr(module, name, None)
    model.to(dtype)
    for module, name, buffer in turns:
        setattr(module, name, buffer)
    return model


def randomise(model: Any, seed: int = 0) -> Any:
    """Seeded weights: unit-variance maps, sharper queries and keys, every bias and gain alive."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() < 2:
            p.data += 0.2 * noise + (1.0 if "language" in name and "q_norm" in name else 0.0)
        elif id(p) in embeddings:
            p.data = noise
        else:
            sharp = "q_proj" in name or "k_proj" in name
            p.data = noise * (1.5 if sharp else 1.0) / p[0].numel() ** 0.5
    if model.can_generate():
        model.get_output_embeddings().weight.data[:FIRST_TEXT] = 0  # writes text tokens only
        model.generation_config.eos_token_id = None  # eight tokens asked are eight tokens given
        model.generation_config.pad_token_id = PAD
        model.generation_config.do_sample = False
    return model.eval()


def inputs(
    name: str,
    kind: str = "image",
    batch: int = 1,
    row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Tensors for ``model(**inputs)``: prompts ``row .. row + batch`` of a kind, left-padded."""
    spec = FAMILIES[name]()
    prompts = [_prompt(name, kind, r) for r in range(row, row + batch)]
    width = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[PAD] * (width - len(ids)) + ids for ids, _ in prompts])
    pads = torch.tensor([width - len(ids) for ids, _ in prompts])
    out = {
        "input_ids": ids,
        "attention_mask": (torch.arange(width)[None] >= pads[:, None]).long(),
    }
    # Qwen of early transformers 5 finds its pictures by their start token instead
    if spec.type_ids in inspect.signature(spec.cls.forward).parameters:
        out[spec.type_ids] = (ids == IMAGE).long() * spec.marked_as
    pictures = [tensors for _, row_pictures in prompts for tensors in row_pictures]
    if pictures and spec.per_row:
        empty = {key: value[:0] for key, value in pictures[0].items()}
        pictures = [
            {key: _cat([p[key] for p in row_pictures or [empty]])[None] for key in empty}
            for _, row_pictures in prompts
        ]
    if pictures:
        out |= (spec.join or joined)(pictures)
    if pictures and spec.counts:
        out["batch_num_images"] = torch.tensor([len(row_pictures) for _, row_pictures in prompts])
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in out.items()}


@functools.cache
def directions(name: str) -> str:
    """A safetensors file with random directions for VTI, text and, with a tower, image."""
    from safetensors.torch import save_file

    model, generator = build(name), torch.Generator().manual_seed(5)
    text, vision = model.get_decoder().config, getattr(model.config, "vision_config", None)
    found = {"text": (text.num_hidden_layers, text.hidden_size)}
    if name in ("llava", "llava_next"):
        found["image"] = (vision.num_hidden_layers, 17, vision.hidden_size)
    tensors = {k: torch.randn(size, generator=generator) for k, size in found.items()}
    path = f"{tempfile.mkdtemp()}/{name}.safetensors"
    save_file(tensors | {"ignored": torch.ones(1)}, path)
    return path


def ready(method: Any, name: str) -> Any:
    """The method with what it needs of a family beside its parameters."""
    return dataclasses.replace(method, path=directions(name)) if method.name == "vti" else method


def rounding(name: str) -> float:
    """How far logits of methods with two streams may be from those of whole runs from the start.

    The gated delta rule sums in chunks from the start and token by token in decoding:
    `test_decoding_equals_reading_from_the_start` measures what that does to the plain model.
    """
    kinds = compat.layer_kinds(compat.decoder_of(build(name)).config)
    if "linear_attention" in kinds:
        return 2e-4
    return 4e-5 if name == "gemma4_moe" else 2e-5  # its router amplifies rounding


def conversation(name: str, second: str, alone: bool = False) -> list[dict[str, Tensor]]:
    """Padded batches on one cache: pictures, two tokens, a turn of kind `second`, two tokens."""
    # Qwen and GLM work positions out from all pictures of a sample in a row, not turn by turn
    batch = 1 if alone or (second == "image" and name.startswith(("qwen", "glm"))) else 3
    tokens = [{"input_ids": torch.tensor([[40 + i], [50 + i], [60 + i]])[:batch]} for i in range(4)]
    first, more = (inputs(name, kind, batch=batch) for kind in ("mixed", second))
    return [first, *tokens[:2], more, *tokens[2:]]


def _prompt(name: str, kind: str, row: int) -> tuple[list[int], list[dict[str, Tensor]]]:
    pieces = KINDS[kind][row]
    ids = [] if kind == "suffix" else [BOS]
    pictures, alone = [], sum(isinstance(piece, str) for piece in pieces) == 1
    for piece in pieces:
        if isinstance(piece, int):
            generator = torch.Generator().manual_seed(piece)
            ids += torch.randint(FIRST_TEXT, VOCAB, (piece,), generator=generator).tolist()
        else:
            tokens, tensors = _picture(name, piece, alone)
            ids += tokens
            pictures.append(tensors)
    return ids, pictures


@functools.cache
def _picture(name: str, shape: str, alone: bool) -> tuple[list[int], dict[str, Tensor]]:
    """Tokens and tensors of one picture; the model itself says how many tokens it makes."""
    spec = FAMILIES[name]()
    tensors = spec.picture(shape, alone)
    call = {key: value[None] if spec.per_row else value for key, value in tensors.items()}
    if spec.counts:
        call["batch_num_images"] = torch.tensor([1 if alone else 2])
    model = build(name)
    with torch.no_grad():
        found = getattr(model, "model", model).get_image_features(**call, return_dict=True)
    features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    features = features if isinstance(features, Tensor) else torch.cat(list(features))
    return spec.layout(features.shape[:-1].numel(), shape), tensors


def joined(pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several pictures, each kind in one."""
    return {key: _cat([p[key] for p in pictures]) for key in pictures[0]}


def _cat(tensors: list[Tensor]) -> Tensor:
    """Concatenate along dim 0, zero-padding the other dims to the largest."""
    sizes = [max(t.shape[i] for t in tensors) for i in range(1, tensors[0].dim())]
    padded = [t.new_zeros(t.shape[0], *sizes) for t in tensors]
    for target, t in zip(padded, tensors, strict=True):
        target[tuple(slice(n) for n in t.shape)] = t
    return torch.cat(padded)


def noise(shape: str, *size: int) -> Tensor:
    seed = 100 + list(SHAPES).index(shape)
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def single(side: int) -> Callable[[str, bool], dict[str, Tensor]]:
    """A picture of any shape is one square of side x side pixels."""
    return lambda shape, alone: {"pixel_values": noise(shape, 1, 3, side, side)}


def cut(shape: str, alone: bool = True) -> dict[str, Tensor]:
    """The tiles of a picture and, where they are several, the whole picture: (tiles, 3, 16, 16)."""
    height, width = SHAPES[shape]
    count = height * width // 4
    return {"pixel_values": noise(shape, count + (count > 1), 3, 16, 16)}


def wrapped(n: int, shape: str) -> list[int]:
    return [START] + [IMAGE] * n + [END]


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def text(model_type: str, layers: int = 4, **extra: Any) -> tf.PreTrainedConfig:
    """A language model of width 64 with four query heads on two key/value heads."""
    return AutoConfig.for_model(model_type, **TEXT | {"num_hidden_layers": layers} | extra)


def tower(model_type: str, **extra: Any) -> tf.PreTrainedConfig:
    return AutoConfig.for_model(model_type, **TOWER | extra)


@family
def llava() -> Family:
    config = tf.LlavaConfig(
        text_config=text("llama", layers=6),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return Family(tf.LlavaForConditionalGeneration, config, single(16))


PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
UNPADDED = {"square": (15, 16), "wide": (12, 32), "tall": (32, 12)}


def tiles(shape: str, alone: bool = True) -> dict[str, Tensor]:
    """A small whole picture and its tiles, as (1, tiles, 3, 16, 16), with its size in pixels."""
    height, width = SHAPES[shape]
    count = 1 + height * width // 4 if alone else 1
    return {
        "pixel_values": noise(shape, 1, count, 3, 16, 16),
        "image_sizes": torch.tensor([UNPADDED[shape]]),
    }


@family
def llava_next() -> Family:
    config = tf.LlavaNextConfig(
        text_config=text("mistral", sliding_window=None),
        vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return Family(tf.LlavaNextForConditionalGeneration, config, lambda shape, alone: tiles(shape))


@family
def llava_onevision() -> Family:
    config = tf.LlavaOnevisionConfig(
        text_config=text("qwen2"),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return Family(tf.LlavaOnevisionForConditionalGeneration, config, tiles, counts=True)


def grid(shape: str, alone: bool) -> dict[str, Tensor]:
    """Qwen: one row per patch of 4 x 4 pixels and two frames, grid in patches (before merging)."""
    height, width = (2 * side for side in SHAPES[shape])
    return {
        "pixel_values": noise(shape, height * width, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def qwen(
    cls: Any, config: Any, model_type: str, layers: int, section: list[int], **vision: Any
) -> Family:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    if "deepstack_visual_indexes" in vision:
        rope["mrope_interleaved"] = True
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, **vision}
    return Family(
        cls,
        config(
            text_config=text(f"{model_type}_text", layers, rope_parameters=rope).to_dict(),
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        ),
        grid,
        wrapped,
        type_ids="mm_token_type_ids",
    )


@family
def qwen2_vl() -> Family:
    vision = {"embed_dim": 32, "hidden_size": 64}
    cls = tf.Qwen2VLForConditionalGeneration
    return qwen(cls, tf.Qwen2VLConfig, "qwen2_vl", 4, [2, 3, 3], **vision)


@family
def qwen2_5_vl() -> Family:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16}
    cls = tf.Qwen2_5_VLForConditionalGeneration
    full = {"fullatt_block_indexes": [1]}
    return qwen(cls, tf.Qwen2_5_VLConfig, "qwen2_5_vl", 6, [2, 3, 3], **vision, **full)


@family
def qwen3_vl() -> Family:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    deep = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    cls = tf.Qwen3VLForConditionalGeneration
    return qwen(cls, tf.Qwen3VLConfig, "qwen3_vl", 4, [4, 2, 2], **vision, **deep)


@family
def internvl() -> Family:
    pairs = {"image_size": [16, 16], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        text_config=text("qwen2"),
        vision_config=tower("internvl_vision", **pairs),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Family(tf.InternVLForConditionalGeneration, config, cut, wrapped)


def masked(shape: str, alone: bool) -> dict[str, Tensor]:
    """Idefics3: every tile is a picture, with a mask of its pixels."""
    pixels = cut(shape)
    mask = torch.ones(len(pixels["pixel_values"]), 16, 16).long()
    return pixels | {"pixel_attention_mask": mask}


def marked(n: int, shape: str) -> list[int]:
    """Every tile has its own run of picture tokens, behind two marks: a border and its place."""
    runs = [[START, BREAK, *[IMAGE] * 4]] * (n // 4)
    return [token for run in runs for token in run] + [START]


def idefics(cls: Any, config: Any, vision: str) -> Family:
    tiny = config(
        text_config=text("llama"),
        vision_config=tower(vision),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return Family(cls, tiny, masked, marked, per_row=True)


@family
def smolvlm() -> Family:
    return idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig, "smolvlm_vision")


@family
def idefics3() -> Family:
    return idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config, "idefics3_vision")


@family
def mistral3() -> Family:
    config = tf.Mistral3Config(
        text_config=text("mistral", sliding_window=None),
        vision_config=tower("pixtral", image_size=32, head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )

    def picture(shape: str, alone: bool) -> dict[str, Tensor]:
        height, width = (8 * side for side in SHAPES[shape])
        pixels = noise(shape, 1, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}

    def layout(n: int, shape: str) -> list[int]:
        height, width = SHAPES[shape]
        return ([IMAGE] * width + [BREAK]) * (height - 1) + [IMAGE] * width + [END]

    return Family(tf.Mistral3ForConditionalGeneration, config, picture, layout)


@family
def gemma3() -> Family:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sliding = {"sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": 16}
    config = tf.Gemma3Config(
        text_config=text("gemma3_text", layers=6, **sliding, attn_logit_softcapping=None),
        vision_config=tower("siglip_vision_model", image_size=24, vision_use_head=False),
        mm_tokens_per_image=9,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    cls = tf.Gemma3ForConditionalGeneration
    return Family(cls, config, single(24), wrapped, type_ids="token_type_ids")


def soft_capped() -> tf.PreTrainedModel:
    """A LLaVA whose language model caps its attention scores (Gemma 2); ``inputs("llava")`` fit."""
    config = llava().config.to_dict()
    config["text_config"] = text("gemma2", query_pre_attn_scalar=16).to_dict()
    return randomise(tf.LlavaForConditionalGeneration(tf.LlavaConfig.from_dict(config)))


class _OwnAttention(nn.Module):
    def __init__(self, width: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class _RemoteLike(tf.PreTrainedModel, tf.GenerationMixin):
    config_class = tf.LlavaConfig

    def __init__(self, config: tf.LlavaConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(_OwnAttention(width, i) for i in range(2))
        self.config.num_hidden_layers = 2
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, **ignored: Any) -> tf.modeling_outputs.ModelOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return tf.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(x))


def remote_like() -> tf.PreTrainedModel:
    """A model as remote code has them: its attention never asks transformers' interface."""
    return randomise(_RemoteLike(llava().config))
