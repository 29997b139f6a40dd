"use strict";
// Answers, heat maps and curves, for the served page and for saved traces. Nothing here knows what
// is chosen on a page. Text of users and models is only ever set as text.

const STOPS = [[0, 0, 4], [32, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84],
  [227, 89, 51], [249, 142, 9], [249, 203, 53], [252, 255, 164]];

const find = (id) => document.getElementById(id);

/** An element in `parent`, with text, never markup. */
function make(name, parent, attributes = {}, text = "") {
  const space = parent.namespaceURI;
  const node = space.endsWith("svg") ? document.createElementNS(space, name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

/** A share as percent, with two digits that count. */
function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.01) return "< 0.01 %";
  return `${value >= 9.95 ? Math.round(value) : Number(value.toPrecision(2))} %`;
}

// ---- columns: one method's answer each, {method, number, article} and, once it has maps,
// {run, layers, depth, buttons, words}

/** A new column, its method above; `line0` to `line5` are the colours of its curve. */
function addColumn(parent, method, number) {
  const article = make("article", parent, {class: `line${number % 6}`});
  const head = make("h2", article);
  make("i", head);
  make("span", head, {}, method);
  return {method, number, article};
}

/** Add the tokens and pictures of a run; `choose` is told a token's index, -1 for all of them. */
async function addRun(column, run, {images, layers, depth}, choose) {
  const row = make("div", column.article, {class: "tokens", role: "group",
    "aria-label": `Answer of ${column.method}, token by token`});
  const buttons = ["whole answer", ...run.tokens.map(visible)].map((text, at) => {
    const button = make("button", row, {type: "button"}, text), p = run.probabilities[at - 1];
    if (p !== undefined) button.title = `token ${at}, probability ${p.toFixed(2)}`;
    button.onclick = () => choose(at - 1);
    return button;
  });
  row.onkeydown = (event) => {
    const at = buttons.indexOf(document.activeElement), last = buttons.length - 1;
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last}[event.key];
    if (to === undefined || to < 0 || to > last) return;
    event.preventDefault();
    buttons[to].click();
    buttons[to].focus();
  };
  for (const picture of run.pictures) {
    const figure = make("figure", column.article);
    await load(picture, images, make("canvas", figure, {role: "img"}));
    if (picture.caption) make("figcaption", figure, {}, picture.caption);
    if (picture.frame)
      await framed(make("canvas", figure, {class: "where", role: "img",
        "aria-label": "Where on the whole picture this part lies"}), images[0], picture.frame);
  }
  const words = make("p", column.article, {class: "numbers", "aria-live": "polite"});
  Object.assign(column, {run, layers, depth, buttons, words});
}

function visible(token) {
  return token.replace(/\n/g, "⏎").trim() || "␣";
}

/** Indices of the tokens that are shown: of the one of this number, or of the whole answer. */
function steps(run, token) {
  if (token < 0) return Array.from({length: run.said}, (_, i) => i);
  return [Math.min(token, run.tokens.length - 1)];
}

/** The mean of rows by token, over the chosen ones. */
function mean(rows, chosen) {
  return rows[0].map((_, at) => chosen.reduce((sum, s) => sum + rows[s][at], 0) / chosen.length);
}

/** Show a layer and a token, -1 for whole answers, of all columns that have maps. */
function showColumns(columns, {layer, token}) {
  const {layers, depth} = columns[0], at = layers.indexOf(layer), slider = find("layer");
  slider.max = layers.length - 1;
  slider.value = at;
  slider.setAttribute("aria-valuetext", `layer ${layer}, of 0 to ${depth - 1}`);
  find("which").textContent = `${layer} (0 to ${depth - 1})`;
  const maps = columns.map(({run}) =>
    run.pictures.map((picture) => weights(picture, steps(run, token), at, layers.length)));
  const ends = scale(maps.flat());
  find("low").textContent = percent(ends[0]);
  find("high").textContent = percent(ends[1]);
  find("ramp").setAttribute("aria-label",
    `Colours: from ${percent(ends[0])}, dark, to ${percent(ends[1])}, bright, of all attention`);
  columns.forEach(({run, buttons, method}, number) => {
    const chosen = steps(run, token);
    buttons.forEach((button, index) => {
      const on = index - 1 === (token < 0 ? -1 : chosen[0]);
      button.setAttribute("aria-pressed", on);
      button.tabIndex = on ? 0 : -1;
    });
    const when = token < 0 ? "its whole answer" : `“${visible(run.tokens[chosen[0]])}”`;
    run.pictures.forEach((picture, index) => {
      paint(picture, find("heat").checked ? maps[number][index] : null, ends);
      picture.canvas.setAttribute("aria-label",
        `Attention of ${method} in layer ${layer} while it writes ${when}`);
    });
  });
}

/**
 * What the numbers of a run say, as phrases.
 *
 * at: index of the layer. object: its name, or null. largest: whether the maps are of the largest
 * weights over heads, which are no shares of all attention.
 */
function phrases(run, chosen, at, object, largest) {
  const share = (rows) => percent(mean(rows, chosen)[at]);
  const told = largest ? [] : [`${share(run.on_image)} of the attention on the image`];
  if (run.on_object?.flat().some((value) => value > 0))
    told.push(largest ? `${share(run.object_share)} of the map on ${object}`
      : `${share(run.on_object)} on ${object}`);
  else if (run.on_object) told.push(`${object} is not in what it was shown`);
  else if (object) told.push(`what of it on ${object} is not known`);
  const stops = [...new Set(chosen.map((step) => run.stopped[step]))];
  if (run.threshold !== null)
    told.push(stops.length > 1 ? "CLVS stops after different layers" : stops[0] === null
      ? "CLVS does not stop" : `CLVS stops after layer ${stops[0]}`);
  return told;
}

// ---- heat maps

async function decoded(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

/** Make a picture of a trace ready to be painted on `canvas`. */
async function load(picture, images, canvas) {
  picture.bytes = Uint8Array.from(atob(picture.heat), (c) => c.charCodeAt(0));
  picture.shown = await decoded(images[picture.image]);
  picture.edge = picture.outline && await decoded(picture.outline);
  picture.canvas = canvas;
  canvas.width = picture.shown.width;
  canvas.height = picture.shown.height;
}

/** Weights by cell, the mean over `steps`; `layer` is an index into the `depth` that were read. */
function weights(picture, steps, layer, depth) {
  const count = picture.rows * picture.cols, sums = new Float32Array(count);
  for (const step of steps) {
    const start = (step * depth + layer) * count, top = picture.peaks[step][layer] / steps.length;
    for (let i = 0; i < count; i++) sums[i] += top * (picture.bytes[start + i] / 255) ** 2;
  }
  return sums;
}

/** What the scale reaches from and to: the 1st and the 99th percentile of all maps together. */
function scale(maps) {
  const sorted = Float32Array.from(maps.flatMap((map) => Array.from(map))).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  return [Math.min(at(0.01), 0.75 * at(0.99)), at(0.99)];
}

/** Paint the picture, and over it the map where there is one. */
function paint(picture, map, [low, high]) {
  const {canvas, shown, edge, rows, cols, box: [left, top, right, bottom]} = picture;
  const {width, height} = canvas, ctx = canvas.getContext("2d");
  ctx.drawImage(shown, 0, 0);
  if (map) {
    ctx.globalCompositeOperation = "saturation";  // grey
    ctx.fillStyle = "#808080";
    ctx.fillRect(0, 0, width, height);
    ctx.globalCompositeOperation = "source-over";
    const place = [left * width, top * height, (right - left) * width, (bottom - top) * height];
    ctx.beginPath();
    ctx.rect(0, 0, width, height);
    ctx.rect(...place);
    ctx.fillStyle = "#ffffffb0";  // not seen by the model
    ctx.fill("evenodd");
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(cells(map, rows, cols, low, high), ...place);
  }
  if (edge) ctx.drawImage(edge, 0, 0, width, height);
}

function cells(map, rows, cols, low, high) {
  const canvas = document.createElement("canvas");
  canvas.width = cols;
  canvas.height = rows;
  const ctx = canvas.getContext("2d"), out = ctx.createImageData(cols, rows);
  map.forEach((weight, i) => {
    const t = Math.min(1, Math.max(0, (weight - low) / Math.max(high - low, 1e-12)));
    const place = t * (STOPS.length - 1), stop = Math.min(Math.floor(place), STOPS.length - 2);
    for (let c = 0; c < 3; c++)
      out.data[4 * i + c] = STOPS[stop][c] + (STOPS[stop + 1][c] - STOPS[stop][c]) * (place - stop);
    out.data[4 * i + 3] = 255 * (0.4 + 0.45 * t);
  });
  ctx.putImageData(out, 0, 0);
  return canvas;
}

/** A small picture with a part of it framed; `part` in fractions. */
async function framed(canvas, uri, [left, top, right, bottom]) {
  const image = await decoded(uri), ctx = canvas.getContext("2d");
  const {width, height} = Object.assign(canvas, {width: image.width, height: image.height});
  ctx.drawImage(image, 0, 0);
  for (const [color, line] of [["#ffffff", width / 40], ["#0b57c2", width / 70]]) {
    ctx.strokeStyle = color;
    ctx.lineWidth = line;
    ctx.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
}

// ---- curves

/** What each line of `svg` stands for: [{number, name}], in the colours and dashes of `chart`. */
function legend(list, svg, lines) {
  list.replaceChildren();
  for (const {number, name} of lines) {
    const item = make("li", list, {class: `line${number % 6}`});
    const sample = document.createElementNS(svg.namespaceURI, "svg");
    item.appendChild(sample).setAttribute("class", "chart sample");
    sample.setAttribute("viewBox", "0 0 36 8");
    sample.setAttribute("aria-hidden", "true");
    make("line", sample, {class: `curve line${number % 6}`, x1: 0, x2: 36, y1: 4, y2: 4});
    make("span", item, {}, name);
  }
}

/**
 * Curves over the layers.
 *
 * lines: [{number, values, layers?, limit?, marks?}]: a value per layer that was read, or per one
 * of `layers`; a dashed line at `limit`; triangles at `marks`, [layer, value] each.
 * layers: numbers of the layers that were read. depth: how many the model has. at: index of the
 * one that is shown. choose: is told a clicked index. top: where the axis ends. format: of values.
 */
function chart(svg, lines, {layers, depth, at, choose, top, format = percent}) {
  const width = svg.clientWidth, height = svg.clientHeight;
  const left = 50, right = 12, low = height - 38;
  if (!width) return;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  top ??= ceiling(Math.max(0, ...lines.flatMap((line) => line.values)));
  const x = (layer) => left + (width - left - right) * layer / Math.max(1, depth - 1);
  const y = (value) => low - (low - 12) * value / top;
  for (let i = 0; i <= 4; i++) {
    const value = top * i / 4;
    make("line", svg, {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)});
    make("text", svg, {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, format(value));
  }
  const every = Math.max(1, Math.ceil(depth / ((width - left) / 34)));
  for (let layer = 0; layer < depth; layer += every)
    make("text", svg, {x: x(layer), y: low + 17, "text-anchor": "middle"}, layer);
  make("text", svg, {x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle"},
    "layer");
  const now = x(layers[at]);
  make("line", svg, {class: "now", x1: now, x2: now, y1: 8, y2: low});
  for (const {number, values, layers: places = layers, limit = null, marks = []} of lines) {
    const color = `line${number % 6}`, points = values.map((v, i) => `${x(places[i])},${y(v)}`);
    if (limit !== null)
      make("line", svg, {class: `limit ${color}`, x1: left, x2: width - right, y1: y(limit),
        y2: y(limit)});
    make("polyline", svg, {class: `curve ${color}`, points: points.join(" ")});
    for (const [layer, value] of marks)
      make("path", svg, {class: `mark ${color}`,
        d: `M${x(layer) - 6},${y(value) - 11}h12l-6,10z`});
    make("circle", svg, {class: `dot ${color}`, cx: now, cy: y(values[places.indexOf(layers[at])]),
      r: 4.5});
  }
  svg.onclick = (event) => {
    const place = event.clientX - svg.getBoundingClientRect().left;
    const away = layers.map((layer) => Math.abs(x(layer) - place));
    choose(away.indexOf(Math.min(...away)));
  };
}

function ceiling(value) {  // a round number that is not below
  if (!(value > 0)) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((n) => n * step).find((t) => t >= value * 0.999) ?? value;
}
