"""foveate beside mitigv: the same model, picture, prompt and tokens through both, in one run.

    make peers                                     # an environment of its own, then all of it
    .venv/peers/bin/python benchmarks/peers.py --sizes pocket --method vcd --tokens 8

Both packages get the tensors of the same processor call and write the same number of tokens, since
nothing ends an answer. Every repetition measures the plain model, foveate and mitigv back to back.

* token: milliseconds per decoded token, from the difference between an answer of all tokens and an
  answer of one. answer: seconds of the whole answer, with preparing and reading the prompt.
* memory: the most that tensors hold at once during an answer of a few tokens, beyond the weights.
* off is plain: whether the parameters that switch a method off give the plain model's tokens.
  1e-9 is plain: whether those do that let it act, but with a strength of 1e-9. mitigv's OPERA needs
  two beams at least, and is held to plain beam search with two.
* Parameters are the defaults of each package, but PAI's alpha, which is 0.5 in both. They are not
  the same algorithm throughout: mitigv's OPERA looks back within windows of its own, its ONLY runs
  a second forward, and its noise comes from the global generator.

A method that a package lacks, or that fails in it, has a sentence instead of figures. Where mitigv
fails behind its own adapter for LLaVA, it gets the bare model, and both are told.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import report  # beside this file, as are the next three
from report import RESULTS, Kind, Say, Table, ratio, spread, timed
from speed import MIB, peak
from subjects import VLMS

from foveate import VLM, FoveateError
from foveate.core.method import Method, methods, parse
from foveate.scenes import world
from foveate.vlm.chat import Chat

FEW = 3  # tokens of the answer whose memory is counted
QUESTION = "Please describe this image in detail."
OURS, THEIRS = "foveate", "mitigv"
YES = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Peer:
    """A method that both packages are asked for by the same name.

    Attributes:
        method: foveate's text form. nearly: with parameters next to the neutral ones.
        given, off, almost: mitigv's parameters, those that switch it off, and those next to them.
        beams: of the plain model that mitigv's neutral parameters are held to.
    """

    method: str
    nearly: str
    given: dict[str, Any]
    off: dict[str, Any]
    almost: dict[str, Any]
    beams: int = 1


_LOOKS_ON = {"num_beams": 2, "threshold": 10**6, "retrospection_window": 10**6 + 1}
PEERS = {
    "vcd": Peer(
        "vcd",
        "vcd(alpha=1e-9, beta=0.0)",
        {},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 1e-9, "beta": 0.0},
    ),
    "icd": Peer(
        "icd",
        "icd(alpha=1e-9, beta=0.0)",
        {},
        {"lam": 0.0, "alpha": 0.0},
        {"lam": 1e-9, "alpha": 0.0},
    ),
    "m3id": Peer(
        "m3id",
        "m3id(forgetting=1e-9, beta=0.0)",
        {},
        {"forgetting_rate": 0.0},
        {"forgetting_rate": 1e-9},
    ),
    "pai": Peer(
        "pai(alpha=0.5)",
        "pai(alpha=1e-9, gamma=1.0)",
        {"alpha": 0.5},
        {"alpha": 0.0, "gamma": 1.0, "beta": 0.0},
        {"alpha": 1e-9, "gamma": 1.0, "beta": 0.0},
    ),
    "opera": Peer(
        "opera",
        "opera(num_beams=1, penalty=1e-9, threshold=1e9)",
        {},
        {"penalty_weight": 0.0, **_LOOKS_ON},
        {"penalty_weight": 1e-9, **_LOOKS_ON},
        beams=2,
    ),
    "only": Peer(
        "only",
        "only(alpha_pos=1e-9, alpha_neg=1e-9, beta=0.0)",
        {},
        {"alpha1": 0.0, "alpha2": 0.0},
        {"alpha1": 1e-9, "alpha2": 1e-9},
    ),
}


# -- the two packages ------------------------------------------------------------------------------


@dataclass
class Task:
    """One prompt, and how each package answers it with a number of tokens: ids."""

    vlm: VLM
    chat: Chat

    def ours(self, stack: tuple[Method, ...], tokens: int, beams: int = 1) -> list[int]:
        """foveate, or the plain model where `stack` is empty."""
        vlm = self.vlm
        inputs = vlm.inputs([self.chat])
        with vlm.using(stack):
            out = vlm.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, num_beams=beams
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def theirs(
        self, name: str, given: dict[str, Any], tokens: int, adapted: bool = True
    ) -> list[int]:
        """mitigv. adapted: with the adapters for LLaVA that it chooses, or on the bare model."""
        from mitigv import build_mitigator, load_mitigator

        make = load_mitigator if adapted else build_mitigator
        made = make(name, model=self.vlm.model, processor=Processor(self.vlm), **given)
        made._eos_token_id = lambda: None
        made._decode = lambda ids: ids
        ids = made.generate(self.chat.images, self.vlm.prompt(self.chat), max_new_tokens=tokens)
        return ids[0].tolist()


class Processor:
    """The processor as `VLM.inputs` calls it, for code that calls processors itself."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.tokenizer = vlm, vlm.tokenizer

    def __call__(self, text: Any, images: Any = None, **options: Any) -> dict[str, Any]:
        first = text if isinstance(text, str) else text[0]
        bos = self.tokenizer.bos_token
        options["add_special_tokens"] = not (bos and first.startswith(bos))
        return dict(self.vlm.processor(text=text, images=images, **options))


def sentence(error: Exception) -> str:
    """What failed, in one sentence."""
    said = re.split(r"(?<!e\.g)\. (?=[A-Z])", " ".join(str(error).split()))[0].rstrip(".")
    if isinstance(error, FoveateError):
        return f"{said}."
    said = said if len(said) < 160 else f"{said[:160]} ..."
    return f"{type(error).__name__}: {said}." if said else f"{type(error).__name__}."


Way = Callable[..., list[int]]  # number of tokens -> ids


def ways(task: Task, name: str) -> dict[str, list[Way]]:
    """Per package the ways to answer with a method, the first one that works being meant."""
    ours = [functools.partial(task.ours, parse(PEERS[name].method))] if name in methods() else []
    theirs = functools.partial(task.theirs, name, PEERS[name].given)
    return {
        "plain": [functools.partial(task.ours, ())],
        OURS: list(ours),
        THEIRS: [theirs, functools.partial(theirs, adapted=False)],
    }


def working(who: str, name: str, tried: list[Way]) -> tuple[Way | None, str]:
    """The way that works, if one does, and what else is to be told."""
    told = "" if tried else f"There is no method {name!r} in this version of {who}."
    for way in tried:
        try:
            written = way(2)  # this is the warm-up, too
            if len(written) == 2:
                return way, f"{told} On the bare model it runs." if told else ""
            told = f"It wrote {len(written)} tokens where 2 were asked."
        except Exception as error:
            told = told or sentence(error)
    return None, told


def same(task: Task, name: str, who: str, way: Way, tokens: int) -> list[bool | str]:
    """Whether a package writes the plain model's tokens when a method is off, and when it is as
    weak as nothing; or what failed."""
    peer = PEERS[name]
    asked: list[Callable[[], bool]] = []
    if who == OURS:
        cls = methods()[name]
        for stack in ((cls(**cls.neutral),), parse(peer.nearly)):
            asked.append(lambda stack=stack: task.ours(stack, tokens) == task.ours((), tokens))
    else:
        adapted = way.keywords.get("adapted", True)  # type: ignore[attr-defined]
        for given in (peer.off, peer.almost):
            asked.append(
                lambda given=given: (
                    task.theirs(name, given, tokens, adapted) == task.ours((), tokens, peer.beams)
                )
            )
    found: list[bool | str] = []
    for ask in asked:
        try:
            found.append(ask())
        except Exception as error:
            found.append(sentence(error))
    return found


# -- measuring -------------------------------------------------------------------------------------


def measure(vlm: VLM, names: list[str], repetitions: int, tokens: int) -> dict[str, Any]:
    """Of every method and package: pairs of seconds (one token, all tokens), bytes, sameness."""
    vlm.model.generation_config.eos_token_id = None
    picture = world.draw(world.sample(0))
    task = Task(vlm, vlm.chat([picture], QUESTION, None))
    task.ours((), 2)  # warm
    rows: dict[str, Any] = {}
    for name in names:
        entry: dict[str, Any] = {"told": {}, "memory": {}, "seconds": {}, "neutral": {}}
        found: dict[str, Way] = {}
        with warnings.catch_warnings(action="ignore"):
            for who, tried in ways(task, name).items():
                way, told = working(who, name, tried)
                if told:
                    entry["told"][who] = told
                if way is None:
                    continue
                found[who] = way
                gc.collect()
                entry["memory"][who] = peak(vlm.model, functools.partial(way, FEW))
                if who != "plain":
                    entry["neutral"][who] = same(task, name, who, way, tokens)
            for _ in range(repetitions):
                for who, way in found.items():
                    pair = [
                        timed(vlm.model, functools.partial(way, count))[0] for count in (1, tokens)
                    ]
                    entry["seconds"].setdefault(who, []).append(pair)
        rows[name] = entry
    return rows


def figures(rows: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Medians per method and package, and the ratios within repetitions."""
    out: dict[str, Any] = {}
    for name, entry in rows.items():
        per_token = {
            who: [(whole - one) / (tokens - 1) for one, whole in pairs]
            for who, pairs in entry["seconds"].items()
        }
        packages = {
            who: {
                "first": statistics.median(one for one, _ in pairs),
                "token": statistics.median(per_token[who]),
                "answer": statistics.median(whole for _, whole in pairs),
                "memory": entry["memory"][who],
            }
            for who, pairs in entry["seconds"].items()
        }
        found = {"packages": packages, "neutral": entry["neutral"], "told": entry["told"]}
        if OURS in per_token and THEIRS in per_token:
            twins = zip(per_token[OURS], per_token[THEIRS], strict=True)
            found["ratio"] = spread([theirs / ours for ours, theirs in twins])
        out[name] = found
    return out


def tables(sizes: dict[str, Any]) -> Iterator[Table]:
    """A table per size, and what failed."""
    failed: list[list[str]] = []
    columns = ["method", "", "token ms", "/ plain", "answer s", "memory MiB"]
    columns += ["off is plain", "1e-9 is plain", "token: mitigv / foveate"]
    for size, part in sizes.items():
        cells = []
        for name, entry in part["figures"].items():
            plain = entry["packages"].get("plain")
            for who in ("plain", OURS, THEIRS):
                plain_too = entry["neutral"].get(who, ["", ""])
                told = [entry["told"].get(who, ""), *(t for t in plain_too if isinstance(t, str))]
                failed += [[size, name, who, what] for what in dict.fromkeys(told) if what]
                if who not in entry["packages"]:
                    continue
                own = entry["packages"][who]
                cells.append(
                    [
                        *(name if who == "plain" else "", who),
                        f"{own['token'] * 1e3:.2f}",
                        f"{own['token'] / plain['token']:.2f}" if plain else "",
                        f"{own['answer']:.2f}",
                        f"{own['memory'] / MIB:,.1f}",
                        *(YES[t] if isinstance(t, bool) else "" for t in plain_too),
                        ratio(entry["ratio"], 2) if who == OURS and "ratio" in entry else "",
                    ]
                )
        yield f"{size}: {part['note']}", columns, cells
    if failed:
        yield "what failed", ["", "method", "package", "what it said"], failed


ABOUT = str(__doc__)[str(__doc__).index("Both packages") :]
KIND = Kind("peers", ABOUT, tables)


# -- the command -----------------------------------------------------------------------------------


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="foveate and mitigv, in one run.")
    parser.add_argument("--sizes", default=",".join(VLMS), help=f"of {', '.join(VLMS)}")
    parser.add_argument("--method", action="append", help=f"of {', '.join(PEERS)}; repeatable")
    parser.add_argument("--repetitions", type=int, default=3, help="answers per row")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, 2 or more")
    args = report.parsed(parser, given)
    args.sizes, args.method = args.sizes.split(","), args.method or list(PEERS)
    for kind, chosen, known in (
        ("size", args.sizes, list(VLMS)),
        ("method", args.method, list(PEERS)),
    ):
        for name in chosen:
            if name not in known:
                parser.error(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    if args.repetitions < 1 or args.tokens < 2:
        parser.error("--repetitions must be 1 or more, and --tokens 2 or more")
    if importlib.util.find_spec(THEIRS) is None:
        parser.error("mitigv is not installed here: run `make peers`, which installs it apart")
    args.out = args.out or RESULTS / f"peers-{args.device.type}"
    return args


def measured(args: argparse.Namespace, size: str, say: Say) -> dict[str, Any]:
    """Both packages on a model of this size, for the report."""
    from importlib.metadata import version

    vlm = VLMS[size](args.device, args.dtype)
    depth = vlm.model.get_decoder().config.num_hidden_layers
    note = f"{report.size_of(vlm.model)}, {depth} layers, {report.dtype_of(vlm.model)}, "
    note += f"{args.tokens} tokens, mitigv {version(THEIRS)}"
    say(f"{size}: {note} ...")
    samples = measure(vlm, args.method, args.repetitions, args.tokens)
    return {"note": note, "figures": figures(samples, args.tokens), "samples": samples}


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    known = functools.partial(measured, args)
    return report.run(KIND, args.sizes, known, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
