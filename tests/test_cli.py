"""CLI against its reference, the specification's self-checks, files and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from torch import Tensor

from foveate import VLM, FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import passing
from foveate.backends.transformers.compat_parts import start_checkpointing
from foveate.backends.transformers.enhance import attach
from foveate.base import artifact
from foveate.benchmarks.pocket import PocketBench
from foveate.evaluation.ask import Plan, evaluate
from foveate.methods.cli.method import CLI, SERVES
from foveate.methods.cli.module import CrossLayerInjection, Summary
from foveate.vlm.prefix import next_position, suffix_batch
from tests import models
from tests.references.cli import CLI as Reference


def served(name: str) -> bool:
    """Whether CLI knows a family's images; False where this transformers cannot build it."""
    try:
        return models.FAMILIES[name]().config.model_type in SERVES
    except ValueError:
        return False


FAMILIES = ["llava", "llava_next", "llava_onevision"]  # of which every patch is a token
MERGING = [
    pytest.param(name, marks=() if name in ("qwen2_5_vl", "internvl") else pytest.mark.slow)
    for name in models.FAMILIES
    if name not in FAMILIES and served(name)
]
NEAR = 1e-4  # routers of experts and the delta rule amplify rounding
SMALL: dict[str, Any] = {"seed": 0, "rank": 4, "heads": 4}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "rms", "reduce": "mean"},
    {"place": "after", "layers": (0, 3)},
    {"share": "pair"},
    {"gate_norm": "rms"},
    {"share": "pair", "gate_norm": "rms", "summary": "image"},
    {"gate": "static", "routes": "one-to-one", "vision_layers": (1, 2)},
    {"gate": "static", "routes": "one-to-many"},
    {"summary": "image", "vision_layers": (1, 2)},
]


def trained(model: Any, folder: Path, **settings: Any) -> CLI:
    """An injection whose every weight is alive, saved and named by its folder."""
    module = CLI(**SMALL, **settings).resolve(anatomy(model)).build(anatomy(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator) / max(1, p.shape[-1]) ** 0.5
    module.save_pretrained(folder)
    return CLI(path=str(folder))


def reference(model: Any, method: CLI) -> Reference:
    return Reference(model, CrossLayerInjection.from_pretrained(method.path))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_reference(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Prompt and eight decode steps of a left-padded batch, against one prompt without a cache."""
    model = models.build(family)
    method = trained(model, tmp_path, **settings)
    for kind in ("image", "images") if not settings else ("image",):
        inputs = models.inputs(family, kind, batch=3)
        with torch.no_grad(), enhance(model, method):
            out = model.generate(
                **inputs, max_new_tokens=9, return_dict_in_generate=True, output_logits=True
            )
        gates = CLI.gates(out)
        config = json.loads((tmp_path / "config.json").read_text())["settings"]
        layers, vision_layers = config["layers"], config["vision_layers"]
        assert gates.shape == (3, len(layers), len(vision_layers))
        for row in range(3):
            slow = reference(model, method)
            written = out.sequences[row, inputs["input_ids"].shape[1] : -1]
            want = slow.logits(models.inputs(family, kind, row=row), written)[-9:]
            got = torch.stack(out.logits)[:, row]
            assert (got - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()) / 10)
            for (layer, k), gate in slow.gates.items():
                place = layers.index(layer), vision_layers.index(k)
                assert torch.allclose(gates[row][place], gate, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"norm": "rms", "vision_layers": (1, 2)}], ids=str)
@pytest.mark.parametrize("family", MERGING)
def test_merged_patches_agree_with_the_reference(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A tower that ends behind each vision layer, merged and projected by the model itself."""
    model = models.build(family)
    method = trained(model, tmp_path, **settings)
    inputs = models.inputs(family, "images", batch=3)
    with torch.no_grad(), enhance(model, method):
        got = model(**inputs).logits[:, -1]
    for row in range(3):
        want = reference(model, method).logits(models.inputs(family, "images", row=row))[-1]
        assert (got[row] - want).abs().max() < NEAR * max(1.0, float(want.abs().max()) / 10)


# -- the specification's self-checks ---------------------------------------------------------------


def forward(model: Any, inputs: dict[str, Tensor], method: CLI | None = None, **extra: Any) -> Any:
    with torch.no_grad(), enhance(model, *([method] if method else [])):
        return model(**inputs, **extra)


def forced(method: CLI, model: Any, logit: float) -> CrossLayerInjection:
    """The module with every gate at the sigmoid of `logit`: at -200 it is 0, at 200 it is 1."""
    module = method.build(anatomy(model))
    for gate in module.gates.values():
        gate.last.weight.data.zero_()
        gate.last.bias.data.fill_(logit)
    return module


@pytest.mark.parametrize("family", [*FAMILIES, *MERGING])
def test_a_closed_gate_is_the_base_model(family: str, tmp_path: Path) -> None:
    model, inputs = models.build(family), models.inputs(family, batch=3)
    plain = forward(model, inputs).logits
    method = trained(model, tmp_path)
    assert not torch.allclose(forward(model, inputs, method).logits, plain)
    with torch.no_grad(), attach(model, (method,), plans={"cli": forced(method, model, -200.0)}):
        closed = model(**inputs)
    assert torch.equal(closed.logits, plain)
    assert CLI.gates(closed).max() == 0
    static = CLI(seed=0, gate="static")  # starts at 0
    assert torch.equal(forward(model, inputs, static).logits, plain)


@pytest.mark.parametrize("family", [*FAMILIES, *MERGING])
def test_an_open_gate_gives_exactly_what_the_model_puts_in_itself(family: str) -> None:
    """B = 0, the used layer only, gate 1: the image's tokens receive P(V_last)."""
    model, inputs = models.build(family), models.inputs(family, "images", batch=3)
    got: list[Tensor] = []
    layer = model.get_decoder().layers[0]
    method = CLI(seed=0, routes="one-to-many", layers=(0,)).resolve(anatomy(model))
    with attach(model, (method,), plans={"cli": forced(method, model, 200.0)}):
        hook = layer.register_forward_hook(
            lambda module, args, out: got.append(args[0]), prepend=True
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
    hook = layer.register_forward_hook(lambda module, args, out: got.append(args[0]))
    forward(model, inputs)
    hook.remove()
    image = (inputs["input_ids"] == models.IMAGE)[..., None]
    assert torch.equal(got[0], torch.where(image, 2 * got[1], got[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_reach_gates_or_image(family: str, tmp_path: Path) -> None:
    """Teacher forcing: other answer tokens change neither the gates nor the image's hidden rows."""
    model = models.build(family)
    method = trained(model, tmp_path)
    inputs = models.inputs(family, batch=3)
    width = inputs["input_ids"].shape[1] - 2  # the last two tokens are the answer
    labels = inputs["input_ids"].clone()
    labels[:, :width] = -100
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, width:] += 1
    runs = [
        forward(model, x, method, labels=labels, output_hidden_states=True) for x in (inputs, other)
    ]
    gates = [CLI.gates(out) for out in runs]
    assert torch.equal(gates[0], gates[1])
    for a, b in zip(runs[0].hidden_states, runs[1].hidden_states, strict=True):
        assert torch.equal(a[:, :width], b[:, :width])
    assert not torch.equal(runs[0].logits[:, width:], runs[1].logits[:, width:])
    blind = forward(model, inputs, method)  # without labels the answer is taken for prompt
    assert not torch.equal(CLI.gates(blind), gates[0])
    prompt = {
        k: v[:, :width] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()
    }
    alone = forward(model, prompt, method)  # training sees what inference sees
    assert torch.allclose(CLI.gates(alone), gates[0], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_rows_of_a_mixed_batch_are_untouched(family: str, tmp_path: Path) -> None:
    model, inputs = models.build(family), models.inputs(family, "mixed", batch=3)
    plain = forward(model, inputs).logits
    edited = forward(model, inputs, trained(model, tmp_path)).logits
    assert torch.equal(edited[1], plain[1])
    assert not torch.allclose(edited[0], plain[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_summary_shares_a_prefix(family: str, tmp_path: Path) -> None:
    model = models.build(family)
    method = trained(model, tmp_path, summary="image")
    assert method.shares_prefix
    assert not CLI(seed=0).shares_prefix
    prefix = models.inputs(family, "prefix")
    suffixes = [models.inputs(family, "suffix", row=i)["input_ids"][0].tolist() for i in range(3)]
    with torch.no_grad(), enhance(model, method):
        cache = prefill(model, prefix)
        first = next_position(model, cache)
        fork = copy.deepcopy(cache)
        fork.batch_repeat_interleave(3)
        shared = model(**suffix_batch(prefix, suffixes, first), **passing(model, fork)).logits[
            :, -1
        ]
    for row in range(3):
        alone = forward(model, models.inputs(family, "shared", row=row), method).logits[0, -1]
        assert (shared[row] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_second_streams(family: str, tmp_path: Path) -> None:
    """Beams as searched by hand on the reference; VCD's noised stream gets no injection."""
    model = models.build(family)
    method = trained(model, tmp_path)
    inputs = models.inputs(family)
    with torch.no_grad(), enhance(model, method):
        beams = model.generate(**inputs, max_new_tokens=5, num_beams=3)
    slow = reference(model, method)
    width = inputs["input_ids"].shape[1]
    assert beams.shape[1] == width + 5
    best = beam_search(lambda written: slow.logits(inputs, written)[-1], 5, 3)
    assert beams[0, width:].tolist() == best
    vcd = "vcd(alpha=0.5, beta=0.0)"
    with torch.no_grad(), enhance(model, method, vcd):
        both = model(**inputs).logits[:, -1]
    with torch.no_grad(), enhance(model, vcd):
        contrasted = model(**inputs).logits[:, -1]
    plain, main = (forward(model, inputs, m).logits[:, -1] for m in (None, method))
    noised = 3 * plain - 2 * contrasted
    assert torch.allclose(both, 1.5 * main - 0.5 * noised, atol=1e-4)


def beam_search(logits: Any, steps: int, width: int) -> list[int]:
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(steps):
        longer = []
        for written, score in beams:
            given = torch.tensor(written, dtype=torch.long) if written else None
            for token, log in enumerate(logits(given).log_softmax(-1).tolist()):
                longer.append(([*written, token], score + log))
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    return beams[0][0]


def test_the_folded_summary_is_multi_head_attention() -> None:
    summary, x = Summary(24, 16, 4), torch.randn(2, 7, 24)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    whole = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=24, vdim=24, batch_first=True)
    whole.q_proj_weight.data = torch.eye(16)
    whole.k_proj_weight.data, whole.v_proj_weight.data = summary.k.weight, summary.v.weight
    whole.out_proj.weight.data = torch.eye(16)
    query = summary.q(summary.query).expand(2, 1, -1)
    want = summary.out(whole(query, x, x, key_padding_mask=~mask)[0][:, 0])
    assert torch.allclose(summary(x, mask), want, atol=1e-6)
    assert torch.equal(summary(x, torch.zeros_like(mask)), torch.zeros(2, 24))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_part_also_through_checkpoints(family: str) -> None:
    model = models.build(family, fresh=True)
    model.requires_grad_(False)
    method = CLI(**SMALL, summary="image").resolve(anatomy(model))
    module = method.build(anatomy(model))
    for gate in module.gates.values():
        torch.nn.init.normal_(gate.last.weight, std=0.01)  # not so much that gates are shut
    for path in module.paths.values():
        torch.nn.init.normal_(path.up.weight)
    inputs = models.inputs(family, batch=3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE, -100)
    grads: list[dict[str, Tensor]] = []
    with attach(model, (method,), plans={"cli": module}):
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                start_checkpointing(model)
            module.zero_grad()
            model(**inputs, labels=labels, use_cache=False).loss.backward()
            grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_injection_comes_back(tmp_path: Path, capsys: Any) -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    method = trained(model, tmp_path / "one", share="pair", layers=(1, 3))
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    assert settings["type"] == "cross-layer injection"
    assert settings["model"]["hidden_size"] == 64
    assert (tmp_path / "one" / "model.safetensors").is_file()
    resolved = method.resolve(anatomy(model))
    assert (resolved.layers, resolved.share, resolved.rank) == ((1, 3), "pair", 4)
    first = forward(model, inputs, method).logits
    module = CrossLayerInjection.from_pretrained(tmp_path / "one")
    module.save_pretrained(tmp_path / "two")
    assert torch.equal(forward(model, inputs, CLI(path=str(tmp_path / "two"))).logits, first)
    assert "foveate" in (tmp_path / "two" / "README.md").read_text()
    assert not capsys.readouterr().out
    with torch.no_grad():  # a file that was trained on is read again
        next(module.parameters()).add_(1.0)
    (tmp_path / "two" / "model.safetensors").unlink()
    module.save_pretrained(tmp_path / "two")
    assert not torch.equal(forward(model, inputs, CLI(path=str(tmp_path / "two"))).logits, first)


def test_an_injection_goes_to_the_hub_and_comes_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    method = trained(model, tmp_path / "here")
    hub = tmp_path / "hub"

    def upload(self: Any, *, repo_id: str, folder_path: str, **rest: Any) -> str:
        shutil.copytree(folder_path, hub)
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **rest: Repo(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    injection = CrossLayerInjection.from_pretrained(method.path)
    assert injection.push_to_hub("somebody/injection") == "somebody/injection"
    assert {p.name for p in hub.iterdir()} == {"README.md", "config.json", "model.safetensors"}

    asked = from_the_hub(monkeypatch, "somebody/injection", hub)
    got = forward(model, inputs, CLI(path="somebody/injection")).logits
    assert torch.equal(got, forward(model, inputs, method).logits)
    assert asked == ["somebody/injection"]
    with pytest.raises(FoveateError, match="neither a folder nor to be had from the hub"):
        forward(model, inputs, CLI(path="nobody/nothing"))


def from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> list[str]:
    """Let the hub have one repository; what it is asked for is noted."""
    asked: list[str] = []

    def download(repo_id: str, **rest: Any) -> str:
        asked.append(repo_id)
        if repo_id != name:
            raise OSError("not found")
        return str(folder)

    artifact._fetched.cache_clear()
    monkeypatch.setattr(artifact, "snapshot_download", download)
    return asked


@pytest.mark.long
@pytest.mark.parametrize("where", ["folder", pytest.param("hub", marks=pytest.mark.slow)])
def test_an_evaluation_reads_the_files_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 questions, two injections and another strength of one of them."""
    vlm = VLM.load("pocket", device="cpu")
    paths = [str(trained(vlm.model, tmp_path / name).path) for name in ("one", "two")]
    asked: list[str] = []
    if where == "hub":
        asked = from_the_hub(monkeypatch, "somebody/injection", tmp_path / "one")
        paths[0] = "somebody/injection"
    opened: list[str] = []
    reading = Path.read_text

    def read(self: Path, *args: Any, **rest: Any) -> str:
        opened.extend([str(self.relative_to(tmp_path))] if tmp_path in self.parents else [])
        return reading(self, *args, **rest)

    taking = Path.read_bytes

    def take(self: Path) -> bytes:
        opened.extend([str(self.relative_to(tmp_path))] if tmp_path in self.parents else [])
        return taking(self)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "read_bytes", take)
    methods = [f"cli(path={paths[0]!r})", f"cli(path={paths[1]!r})"]
    methods.append(f"cli(path={paths[0]!r},strength=0.5)")
    benchmark = PocketBench(word_tokens=2, categories=("existence-random",), questions=8)
    found = evaluate(Plan([benchmark], methods, tmp_path / "run"), vlm)
    for entry in found["benchmarks"][str(benchmark)]["methods"].values():
        assert (entry["questions"], entry["errors"]) == (16, 0)
    files = [name for name in opened if not name.startswith("run/")]
    expected = ["config.json", "model.safetensors"]
    assert sorted(files) == [f"{name}/{file}" for name in ("one", "two") for file in expected]
    assert asked == ["somebody/injection"] * (where == "hub")


@dataclass
class Repo:
    repo_id: str


def test_strength_scales_what_is_added(tmp_path: Path) -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    trained(model, tmp_path)
    logits = [
        forward(model, inputs, CLI(path=str(tmp_path), strength=s)).logits for s in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(logits[0], forward(model, inputs).logits)
    assert not torch.allclose(logits[1], logits[2])


def test_what_is_refused_in_one_sentence(tmp_path: Path) -> None:
    llava, onevision = models.build("llava"), models.build("llava_onevision")
    trained(onevision, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    trained(llava, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    trained(llava, tmp_path / "light")
    (tmp_path / "light" / "model.safetensors").unlink()
    trained(llava, tmp_path / "mine")
    cases = {
        "cli": "cli is trained: give path",
        f"cli(path='{tmp_path}/other')": "belongs to another model: its model_type is llava_onevis",
        f"cli(path='{tmp_path}/none')": "There is no folder",
        f"cli(path='{tmp_path}/empty')": "has no readable config.json",
        f"cli(path='{tmp_path}/light')": "has no model.safetensors",
        f"cli(path='{tmp_path}/model')": "is no cross-layer injection",
        f"cli(path='{tmp_path}/broken')": "is damaged: its model.safetensors",
        f"cli(path='{tmp_path}/mine', rank=8)": "was trained with rank=4: leave out rank",
        "cli(seed=0, vision_layers=(9,))": "vision layer 9 does not exist",
        "cli(seed=0, layers=(9,))": "layer 9 does not exist",
        "cli(seed=0, layers=())": "layers is empty",
        "cli(seed=0, path='x')": "give path",
        "cli(seed=0, gate=tanh)": "gate must be 'scalar' or 'static'",
    }
    for text, sentence in cases.items():
        with pytest.raises(FoveateError, match=sentence), enhance(llava, text):
            pass
    inputs = models.inputs("llava")
    with enhance(llava, "cli(seed=0)"):
        features = llava.model.get_image_features(inputs["pixel_values"], return_dict=True)
        with pytest.raises(FoveateError, match="reads the vision tower, which did not run"):
            llava(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": features},
            )
    with pytest.raises(FoveateError, match="There are no gates"):
        CLI.gates(forward(llava, inputs))


def test_a_video_is_refused() -> None:
    model = models.build("llava_onevision")
    pixels = models.inputs("llava_onevision", "images")["pixel_values"][:, :1]
    count = 10  # tokens that the tiny model makes of these frames
    ids = torch.tensor([[models.BOS, *[models.VIDEO] * count, 11, 12]])
    with enhance(model, "cli(seed=0)"), pytest.raises(FoveateError, match="not videos"):
        model(input_ids=ids, pixel_values_videos=pixels)
