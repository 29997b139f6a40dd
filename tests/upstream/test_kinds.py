"""Models of which few layers or none see the whole image, on their default configurations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.handshake import handshake
from foveate.methods.clvs import CLVS
from foveate.methods.vaf import VAF


def outline(model_type: str) -> Any:
    """The model of a default configuration, on the meta device."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = transformers.CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        try:
            return transformers.AutoModelForImageTextToText.from_config(config)
        except AttributeError as error:
            pytest.skip(f"transformers {transformers.__version__} cannot build it: {error}")


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("glm5_next", "34 linear_attention, 11 indexed_attention"),
        ("hy_v4_vl", "78 indexed_attention"),
        ("mistral_large4", "72 indexed_attention"),
        ("dots3_note", "13 indexed_attention, 33 sliding_attention"),
        ("inkling_mm_model", "hybrid"),
    ],
)
def test_a_model_without_an_editable_layer_is_refused_with_its_kinds(
    model_type: str, kinds: str
) -> None:
    model = outline(model_type)
    assert anatomy(model).full_layers == ()
    with pytest.raises(FoveateError, match=rf"none of its layers.*{kinds}"), enhance(model, "clvs"):
        pass


@pytest.mark.parametrize("model_type", ["qwen3_5", "gemma4"])
def test_published_layers_that_shrink_are_told(model_type: str) -> None:
    model = outline(model_type)
    with pytest.warns(UserWarning, match="9, 10, 11, 12, 13, 14, only 11 see the whole image"):
        assert VAF().resolve(anatomy(model)).layers == (11,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # CLVS names no layers: it takes all that see the image
        assert CLVS().resolve(anatomy(model)).layers == anatomy(model).full_layers


def test_published_layers_that_vanish_are_an_error() -> None:
    """Qwen3.5's full-attention layers are 3, 7, 11, ..."""

    class Between(VAF, register=False):  # type: ignore[misc]
        paper_layers = (8, ..., 10)

    with pytest.raises(FoveateError, match=r"here 8, 9, 10, do not see the whole image"):
        Between().resolve(anatomy(outline("qwen3_5")))


def test_the_layers_of_a_decoder_behind_its_own_unembedding_are_found() -> None:
    """Llama 4 names a whole language model as its decoder; three of four layers are chunked."""
    model = outline("llama4")
    found = handshake(model)
    assert found.decoder.layers
    assert anatomy(model).full_layers == tuple(range(3, len(found.kinds), 4))


@pytest.mark.parametrize("model_type", ["mllama", "idefics", "florence2"])
def test_a_model_that_looks_at_the_image_aside_is_refused(model_type: str) -> None:
    with pytest.raises(FoveateError, match="looks at the image in cross-attention"):
        handshake(outline(model_type))


def test_a_model_that_writes_no_tokens_one_by_one_is_refused() -> None:
    with pytest.raises(FoveateError, match="does not write one token after the other"):
        handshake(outline("pi0"))
