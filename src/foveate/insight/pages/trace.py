"""A trace as one HTML page that needs nothing else: pictures and numbers are inside it."""

from __future__ import annotations

import base64
import html as markup
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...families.layout import WHOLE
from .report import STYLE

if TYPE_CHECKING:
    from ..trace import Picture, Run, Trace

SIDE = 480  # pixels of a picture's longer side
OUTLINE = (127, 224, 255, 255)

LOOK = """
:root { --line0: #c14e00; --line1: #0072b2; --line2: #00805f; --line3: #a34f82; --line4: #8a6100;
  --line5: #1f7fb8; }
@media (prefers-color-scheme: dark) { :root { --line0: #ff9a56; --line1: #5cb8f0; --line2: #35d0a5;
  --line3: #e9a3cb; --line4: #f0b94a; --line5: #8fd0ff; } }
h1 { margin-bottom: .25rem; }
.controls { position: sticky; top: 0; z-index: 3; background: var(--back); padding: .6rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem 1rem;
  align-items: center; }
.controls label { font-weight: 600; white-space: nowrap; }
.controls output { display: inline-block; min-width: 5.2rem; font-variant-numeric: tabular-nums; }
.controls .plain { font-weight: 400; }
.controls input[type=range] { flex: 1 1 12rem; min-width: 8rem; height: 2rem;
  accent-color: var(--link); }
.ramp { display: flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--soft); }
.ramp i { width: 6rem; height: .7rem; border-radius: .2rem; background: linear-gradient(90deg,
  #000004, #200c4a, #57106e, #8a226a, #bc3754, #e35933, #f98e09, #f9cb35, #fcffa4); }
.methods { display: grid; gap: 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); align-items: start; }
@media (max-width: 44rem) { .methods { gap: .75rem; grid-template-columns: 1fr 1fr; }
  article:only-child { grid-column: 1 / -1; } }
article { min-width: 0; }
article h2 { border: 0; padding: 0; margin: 0 0 .4rem; font-size: 1.15rem; display: flex;
  gap: .5rem; align-items: center; overflow-wrap: anywhere; }
article h2 i { flex: none; width: 1rem; height: .3rem; border-radius: .15rem; }
.tokens { display: flex; flex-wrap: wrap; gap: .3rem; max-height: 11rem; overflow-y: auto;
  padding: .25rem; margin: 0 -.25rem .5rem; }
button { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: .4rem; padding: .3rem .6rem; min-height: 2.25rem; cursor: pointer;
  white-space: pre; }
button[aria-pressed=true] { background: var(--link); color: var(--back);
  border-color: var(--link); }
figure { margin: 0 0 .6rem; }
canvas { display: block; width: 100%; height: auto; max-height: 70vh; object-fit: contain;
  border-radius: .4rem; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .25rem; }
.where { position: relative; width: 7rem; }
.where img { display: block; width: 100%; border-radius: .25rem; }
.where i { position: absolute; border: 2px solid #0b57c2; box-shadow: 0 0 0 1px #fff; }
.numbers { margin: 0; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.charts h2 { border: 0; padding: 0; margin: 0 0 .25rem; font-size: 1rem; }
.charts svg { display: block; width: 100%; height: 15rem; cursor: crosshair; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .now { stroke: var(--ink); stroke-width: 1.5; }
svg .curve { fill: none; stroke-width: 2.2; }
svg .limit { stroke-dasharray: 5 4; }
fieldset { border: 0; padding: 0; margin: 0 0 .5rem; display: flex; flex-wrap: wrap;
  gap: .25rem 1rem; font-size: .925rem; }
legend { position: absolute; left: -100vw; }
@media (max-width: 30rem) { .ramp { display: none; } }
@media (max-height: 30rem) { .controls { position: static; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const STOPS = [[0, 0, 4], [32, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84],
  [227, 89, 51], [249, 142, 9], [249, 203, 53], [252, 255, 164]];
const COLORS = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * (STOPS.length - 1), at = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[at].map((low, c) => low + (STOPS[at + 1][c] - low) * (place - at));
});
const find = (id) => document.getElementById(id);
const state = {layer: data.start, token: data.runs[0].said > 1 ? -1 : 0, share: false};
const percent = (x) => (100 * x).toFixed(x > 0 && x < 0.0995 ? 1 : 0) + " %";

function make(name, parent, attributes = {}, text = "") {
  const svg = parent.namespaceURI.endsWith("svg");
  const node = svg ? document.createElementNS(parent.namespaceURI, name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

// ---- what is chosen

function steps(run) {  // of a run, at the chosen token; all of the answer where none is chosen
  if (state.token < 0) return Array.from({length: run.said}, (_, i) => i);
  return [Math.min(state.token, run.tokens.length - 1)];
}

function mean(run, rows) {  // of rows by token, at the chosen ones
  const chosen = steps(run);
  return rows[0].map((_, at) => chosen.reduce((sum, s) => sum + rows[s][at], 0) / chosen.length);
}

function spoken(token) {
  const text = token.replace(/\\n/g, "\\u23ce");
  return text.trim() ? text.trim() : "\\u2423";
}

// ---- heat maps

function load(picture) {
  picture.bytes = Uint8Array.from(atob(picture.heat), (c) => c.charCodeAt(0));
  const image = new Image(), outline = new Image();
  const ready = (img, src) => new Promise((done) => { img.onload = done; img.src = src; });
  const waits = [ready(image, data.images[picture.image])];
  if (picture.outline) waits.push(ready(outline, picture.outline));
  return Promise.all(waits).then(() => {
    const canvas = picture.canvas, w = image.width, h = image.height;
    canvas.width = w; canvas.height = h;
    const ctx = picture.ctx = canvas.getContext("2d", {willReadFrequently: true});
    picture.shown = image;
    ctx.drawImage(image, 0, 0);
    const raw = ctx.getImageData(0, 0, w, h).data, grey = picture.grey = new Float32Array(w * h);
    for (let i = 0; i < w * h; i++)
      grey[i] = 0.299 * raw[4 * i] + 0.587 * raw[4 * i + 1] + 0.114 * raw[4 * i + 2];
    const [low, high] = ends(grey);
    for (let i = 0; i < w * h; i++) {
      const lit = Math.min(1, Math.max(0, (grey[i] - low) / Math.max(high - low, 12)));
      grey[i] = 255 * (0.1 + 0.9 * lit);
    }
    const cell = (pixels, start, stop, count) => Int32Array.from({length: pixels}, (_, i) => {
      const at = Math.floor(((i + 0.5) / pixels - start) / (stop - start) * count);
      return at >= 0 && at < count ? at : -1;
    });
    picture.rowOf = cell(h, picture.box[1], picture.box[3], picture.rows);
    picture.colOf = cell(w, picture.box[0], picture.box[2], picture.cols);
    picture.outlined = picture.outline ? outline : null;
  });
}

function ends(values) {  // the 1st and the 99th percentile
  const sorted = Float32Array.from(values).sort();
  return [0.01, 0.99].map((q) => sorted[Math.round(q * (sorted.length - 1))]);
}

function heat(run, picture) {  // weights by cell, at the chosen layer and token
  const cells = picture.rows * picture.cols, found = new Float32Array(cells), chosen = steps(run);
  for (const step of chosen) {
    const from = (step * data.layers.length + state.layer) * cells;
    const top = picture.peaks[step][state.layer] / chosen.length;
    for (let i = 0; i < cells; i++) found[i] += top * (picture.bytes[from + i] / 255) ** 2;
  }
  return found;
}

function paint(picture, values, low, span) {
  const {ctx, grey, rowOf, colOf} = picture, w = colOf.length, h = rowOf.length;
  if (!find("heat").checked) return ctx.drawImage(picture.shown, 0, 0);
  const out = ctx.createImageData(w, h);
  for (let y = 0, i = 0; y < h; y++) {
    for (let x = 0; x < w; x++, i++) {
      const row = rowOf[y], col = colOf[x], inside = row >= 0 && col >= 0;
      const v = inside ? (values[row * picture.cols + col] - low) / span : 0;
      const t = Math.min(1, Math.max(0, v)), alpha = 0.55 + 0.3 * t;
      const color = COLORS[Math.round(255 * t)];
      for (let c = 0; c < 3; c++)
        out.data[4 * i + c] = inside ? (1 - alpha) * grey[i] + alpha * color[c]
          : 0.3 * grey[i] + 178;
      out.data[4 * i + 3] = 255;
    }
  }
  ctx.putImageData(out, 0, 0);
  if (picture.outlined) ctx.drawImage(picture.outlined, 0, 0, w, h);
}

// ---- curves

function chart(svg, lines, top, format) {
  const w = svg.clientWidth, h = svg.clientHeight, left = 46, right = 10, low = h - 24;
  if (!w) return;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  const x = (layer) => left + (w - left - right) * layer / Math.max(1, data.depth - 1);
  const y = (value) => low - (low - 12) * value / top;
  for (let i = 0; i <= 4; i++) {
    const value = top * i / 4;
    make("line", svg, {class: "grid", x1: left, x2: w - right, y1: y(value), y2: y(value)});
    make("text", svg, {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, format(value));
  }
  const every = Math.max(1, Math.ceil(data.depth / ((w - left) / 34)));
  for (let layer = 0; layer < data.depth; layer += every)
    make("text", svg, {x: x(layer), y: h - 6, "text-anchor": "middle"}, layer);
  const now = x(data.layers[state.layer]);
  make("line", svg, {class: "now", x1: now, x2: now, y1: 8, y2: low});
  for (const line of lines) {
    const color = `stroke: var(--line${line.number % 6})`;
    if (line.limit !== null)
      make("line", svg, {class: "limit", x1: left, x2: w - right, y1: y(line.limit),
        y2: y(line.limit), style: color});
    const points = line.values.map((value, at) => `${x(line.layers[at])},${y(value)}`);
    make("polyline", svg, {class: "curve", points: points.join(" "), style: color});
    for (const [layer, value] of line.marks)
      make("path", svg, {d: `M${x(layer) - 6},${y(value) - 11}h12l-6,10z`,
        style: `fill: var(--line${line.number % 6})`});
  }
  svg.onclick = (event) => {
    const place = (event.clientX - svg.getBoundingClientRect().left - left) / (w - left - right);
    const layer = place * (data.depth - 1);
    const away = data.layers.map((l) => Math.abs(l - layer));
    state.layer = away.indexOf(Math.min(...away));
    show();
  };
}

function curves() {
  const key = state.share ? "object_share" : data.measure;
  const known = data.runs.map((run, number) => ({run, number})).filter(({run}) => run[key]);
  const looks = known.map(({run, number}) => ({number, layers: data.layers, limit: null,
    marks: [], values: mean(run, run[key])}));
  const most = Math.max(1e-6, ...looks.flatMap((line) => line.values));
  const step = 10 ** Math.floor(Math.log10(most));
  const top = [1, 2, 4, 6, 8, 10].map((n) => n * step).find((t) => t >= most * 0.999) || most;
  chart(find("look"), looks, top, data.measure === "on_image" && data.largest ? String : percent);
  const every = Array.from({length: data.depth}, (_, i) => i);
  chart(find("doubt"), data.runs.map((run, number) => ({number, layers: every,
    limit: run.tested.length ? run.threshold : null, values: mean(run, run.uncertainty),
    marks: steps(run).filter((s) => run.stopped[s] !== null)
      .map((s) => [run.stopped[s], run.uncertainty[s][run.stopped[s]]])})), 1,
    (value) => value.toFixed(2));
}

// ---- all of it

function words(run) {
  const chosen = steps(run), at = state.layer, layer = data.layers[at];
  const share = (name) => percent(mean(run, run[name])[at]), told = [];
  if (!data.largest) told.push(`${share("on_image")} of the attention on the image`);
  if (run.on_object)
    told.push(`${data.largest ? `${share("object_share")} of the map` : share("on_object")}`
      + ` on ${data.object}`);
  told.push(`uncertainty ${mean(run, run.uncertainty)[layer].toFixed(2)}`);
  if (run.threshold !== null) {
    const stops = [...new Set(chosen.map((s) => run.stopped[s]))];
    if (stops.length > 1) told.push("stops after different layers");
    else told.push(stops[0] === null ? "does not stop" : `stops after layer ${stops[0]}`);
  }
  return told.join(", ") + ".";
}

function show() {
  const layer = data.layers[state.layer];
  find("layer").value = state.layer;
  find("layer").setAttribute("aria-valuetext", `layer ${layer}`);
  find("which").textContent = `${layer} of ${data.depth - 1}`;
  const maps = data.runs.map((run) => run.pictures.map((picture) => heat(run, picture)));
  const all = [].concat(...maps.flat().map((values) => Array.from(values)));
  const [first, high] = ends(all), low = Math.min(first, 0.75 * high);
  data.runs.forEach((run, number) => {
    const chosen = steps(run);
    run.buttons.forEach((button, at) => {
      const token = at - 1, on = state.token < 0 ? token < 0 : token === chosen[0];
      button.setAttribute("aria-pressed", on);
      button.tabIndex = on ? 0 : -1;
    });
    run.pictures.forEach((picture, at) => {
      paint(picture, maps[number][at], low, Math.max(high - low, 1e-12));
      const when = state.token < 0 ? "the whole answer" : `"${spoken(run.tokens[chosen[0]])}"`;
      picture.canvas.setAttribute("aria-label",
        `Attention of ${run.method} in layer ${layer} while it writes ${when}`);
    });
    run.words.textContent = words(run);
  });
  curves();
  history.replaceState(null, "",
    `#layer=${layer}&token=${state.token < 0 ? "all" : state.token}`);
}

function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  const layer = data.layers.indexOf(Number(given.get("layer") || NaN));
  if (layer >= 0) state.layer = layer;
  const token = given.get("token"), most = Math.max(...data.runs.map((r) => r.tokens.length));
  if (token === "all") state.token = -1;
  else if (token !== null && Number(token) >= 0 && Number(token) < most) state.token = +token;
}

function build(run, number) {
  const article = make("article", find("methods"));
  const head = make("h2", article);
  make("i", head, {style: `background: var(--line${number % 6})`});
  make("span", head, {}, run.method);
  const row = make("div", article, {class: "tokens", role: "group",
    "aria-label": `Answer of ${run.method}, token by token`});
  run.buttons = ["whole answer", ...run.tokens.map(spoken)].map((text, at) => {
    const button = make("button", row, {type: "button"}, text);
    const p = run.probabilities[at - 1];
    if (p !== undefined) button.title = `token ${at}, probability ${p.toFixed(2)}`;
    button.onclick = () => { state.token = at - 1; show(); };
    return button;
  });
  row.onkeydown = (event) => {
    const at = run.buttons.indexOf(document.activeElement), last = run.buttons.length - 1;
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last}[event.key];
    if (to === undefined || to < 0 || to > last) return;
    event.preventDefault();
    run.buttons[to].click();
    run.buttons[to].focus();
  };
  for (const picture of run.pictures) {
    const figure = make("figure", article);
    picture.canvas = make("canvas", figure, {role: "img"});
    if (picture.caption) make("figcaption", figure, {}, picture.caption);
    if (picture.frame) {
      const where = make("div", figure, {class: "where"}), [l, t, r, b] = picture.frame;
      make("img", where, {src: data.images[0], alt: "where on the whole image this part lies"});
      make("i", where, {style: `left: ${100 * l}%; top: ${100 * t}%; width: ${100 * (r - l)}%; `
        + `height: ${100 * (b - t)}%`});
    }
  }
  run.words = make("p", article, {class: "numbers", "aria-live": "polite"});
}

data.runs.forEach(build);
restore();
find("layer").max = data.layers.length - 1;
find("layer").oninput = (event) => { state.layer = Number(event.target.value); show(); };
find("heat").onchange = show;
for (const option of document.getElementsByName("measure"))
  option.onchange = () => { state.share = option.value === "share" && option.checked; show(); };
Promise.all(data.runs.flatMap((run) => run.pictures.map(load))).then(() => {
  show();
  document.body.dataset.ready = "yes";
  addEventListener("resize", curves);
  addEventListener("hashchange", () => { restore(); show(); });
});
"""


def page(trace: Trace) -> str:
    """The whole page: no outside resource, usable from a file."""
    question = markup.escape(trace.question)
    inside = json.dumps(drawn(trace), separators=(",", ":")).replace("<", "\\u003c")
    target = None if trace.target is None else markup.escape(trace.target.name)
    looked = "Attention to the image" if target is None else f"Attention to {target}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Trace: {question}</title>
<style>{STYLE}{LOOK}</style>
</head>
<body>
<a class="skip" href="#methods">To the heat maps</a>
<h1>{question}</h1>
<p class="soft">{_about(trace)}</p>
<noscript><p>This page draws its heat maps with a script: allow scripts, or look at strip.png and
curves.png beside it.</p></noscript>
<div class="controls">
<label for="layer">Layer <output id="which" for="layer"></output></label>
<input id="layer" type="range" min="0" step="1">
<label class="plain"><input id="heat" type="checkbox" checked> heat map</label>
<span class="ramp">least <i></i> most in its layer</span>
</div>
<main>
<div class="methods" id="methods" tabindex="-1"></div>
<div class="charts">
<section><h2>{looked}, by layer</h2>{_MEASURES * (trace.measure == "on_object")}
<svg id="look" role="img" aria-label="{looked} by layer, a line per method"></svg></section>
<section><h2>Uncertainty of the layer's own prediction</h2>
<svg id="doubt" role="img" aria-label="Uncertainty by layer, a line per method"></svg></section>
</div>
<details><summary>How to read this</summary>
<ul>
<li>Move the layer with the slider (arrow keys work) or a click on a curve; choose a token of an
answer, or the mean over the whole answer. All methods show the same layer, and their token of the
same number.</li>
<li>The brighter a square, the more the model looks there while it writes the token. Colours mean
the same for all methods in a layer, not in different layers; they reach from the 1st to the 99th
percentile. Pale parts are not seen by the model.</li>
<li>Weights are those of the last query row after the softmax over all text and image tokens, and
after the method's edits. What is not on the image goes to the words.</li>
<li>Attention to an object counts every image token by the share of its area that is the object's.
Of all attention it is the measure of CLVS's figures 2 and 6.</li>
<li>Uncertainty is CLVS's u, eq. (8) of arXiv 2509.12897: the entropy of the layer's own prediction
over its likeliest tokens, 0 to 1. Below the dashed line a tested layer stops CLVS: a triangle.</li>
</ul>
</details>
</main>
<script type="application/json" id="data">{inside}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


_MEASURES = """
<fieldset><legend>Measured as</legend>
<label><input type="radio" name="measure" value="mass" checked> of all attention</label>
<label><input type="radio" name="measure" value="share"> of the attention on the image</label>
</fieldset>"""


def _about(trace: Trace) -> str:
    """Model, heads, object, in a sentence each."""
    if isinstance(trace.heads, str):
        heads = {"mean": "Mean over heads.", "max": "Largest of all heads."}[trace.heads]
    else:
        heads = f"Mean over heads {', '.join(map(str, trace.heads))}."
    told = f"Model {trace.model}. {heads}"
    if trace.target is not None:
        told += f" Outlined: {trace.target.name}, {trace.target.area:.1%} of the image."
    return markup.escape(told)


def drawn(trace: Trace) -> dict[str, Any]:
    """What the script draws."""
    first = trace.runs[0]
    watched = getattr(first, trace.measure)
    watched = first.on_image if watched is None else watched
    images = [_uri(_small(trace.image))]
    runs = [_run(trace, run, images) for run in trace.runs]
    return {
        "object": None if trace.target is None else trace.target.name,
        "measure": trace.measure,
        "largest": trace.heads == "max",
        "layers": first.layers,
        "depth": first.uncertainty.shape[1],
        "start": int(watched[: first.said].mean(0).argmax()),
        "images": images,
        "runs": runs,
    }


def _run(trace: Trace, run: Run, images: list[str]) -> dict[str, Any]:
    def numbers(values: np.ndarray | None) -> Any:
        return None if values is None else [[float(f"{x:.4g}") for x in row] for row in values]

    return {
        "method": run.method,
        "tokens": run.tokens,
        "said": run.said,
        "probabilities": run.answer.probabilities,
        "on_image": numbers(run.on_image),
        "on_object": numbers(run.on_object),
        "object_share": numbers(run.object_share),
        "uncertainty": numbers(run.uncertainty),
        "stopped": run.stopped,
        "threshold": run.threshold,
        "tested": run.tested,
        "pictures": [_picture(trace, picture, images) for picture in run.pictures],
    }


def _picture(trace: Trace, picture: Picture, images: list[str]) -> dict[str, Any]:
    """One picture, its maps in one byte per cell: the root of the share of the map's maximum."""
    small = _small(picture.image)
    uri = _uri(small)
    if uri not in images:
        images.append(uri)
    heat = picture.heat.astype(np.float32)
    peaks = heat.max((-2, -1))
    shares = np.sqrt(heat / np.maximum(peaks, 1e-12)[..., None, None])
    part, whole = picture.part, picture.part == WHOLE
    caption = ""
    if part is None:
        caption = "A picture that the method made."
    elif not whole:
        wide, high = trace.image.size
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(part, (wide, high, wide, high), strict=True)
        )
        caption = (
            "The part of the image that the method asked about: "
            f"pixels {left} to {right} across, {top} to {bottom} down."
        )
    return {
        "image": images.index(uri),
        "outline": _outline(trace, picture, small.size),
        "rows": heat.shape[-2],
        "cols": heat.shape[-1],
        "box": picture.box,
        "caption": caption,
        "frame": None if whole else part,
        "peaks": [[float(f"{x:.4g}") for x in row] for row in peaks],
        "heat": base64.b64encode((255 * shares).round().astype(np.uint8).tobytes()).decode(),
    }


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size])


def _uri(image: Image.Image) -> str:
    """As a data URI: JPEG, or PNG where the image is transparent somewhere."""
    kind = "PNG" if image.mode == "RGBA" else "JPEG"
    stream = io.BytesIO()
    image.save(stream, kind, quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def _outline(trace: Trace, picture: Picture, size: tuple[int, int]) -> str | None:
    """The edge of the object on a picture, two pixels wide, else transparent; None without it."""
    if trace.target is None or picture.part is None:
        return None
    seen = trace.target.seen(picture.part, size)
    inner = np.pad(seen, 2, mode="edge")
    around = [
        inner[2 + y : inner.shape[0] - 2 + y, 2 + x : inner.shape[1] - 2 + x]
        for y, x in ((-2, 0), (2, 0), (0, -2), (0, 2))
    ]
    edge = seen & ~np.logical_and.reduce(around)
    if not edge.any():
        return None
    drawn = np.zeros((*seen.shape, 4), np.uint8)
    drawn[edge] = OUTLINE
    return _uri(Image.fromarray(drawn))
