// Heat maps and curves. Nothing here knows what is chosen on the page.

const STOPS = [[0, 0, 4], [32, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84],
  [227, 89, 51], [249, 142, 9], [249, 203, 53], [252, 255, 164]];

/** An element in `parent`, with text, never markup. */
export function make(name, parent, attributes = {}, text = "") {
  const space = parent.namespaceURI;
  const node = space.endsWith("svg") ? document.createElementNS(space, name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

/** A share as percent, with two digits that count. */
export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.01) return "< 0.01 %";
  return `${value >= 9.95 ? Math.round(value) : Number(value.toPrecision(2))} %`;
}

async function decoded(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

/** Make a picture of a trace ready to be painted on `canvas`. */
export async function load(picture, images, canvas) {
  picture.bytes = Uint8Array.from(atob(picture.heat), (c) => c.charCodeAt(0));
  picture.shown = await decoded(images[picture.image]);
  picture.edge = picture.outline && await decoded(picture.outline);
  picture.canvas = canvas;
  canvas.width = picture.shown.width;
  canvas.height = picture.shown.height;
}

/** Weights by cell, the mean over `steps`; `layer` is an index into the `depth` that were read. */
export function weights(picture, steps, layer, depth) {
  const cells = picture.rows * picture.cols, found = new Float32Array(cells);
  for (const step of steps) {
    const start = (step * depth + layer) * cells, top = picture.peaks[step][layer] / steps.length;
    for (let i = 0; i < cells; i++) found[i] += top * (picture.bytes[start + i] / 255) ** 2;
  }
  return found;
}

/** What the scale reaches from and to: the 1st and the 99th percentile of all maps together. */
export function scale(maps) {
  const sorted = Float32Array.from(maps.flatMap((map) => Array.from(map))).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  return [Math.min(at(0.01), 0.75 * at(0.99)), at(0.99)];
}

/** Paint the picture, and over it the map where there is one. */
export function paint(picture, map, [low, high]) {
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
export async function framed(canvas, uri, [left, top, right, bottom]) {
  const image = await decoded(uri), ctx = canvas.getContext("2d");
  const {width, height} = Object.assign(canvas, {width: image.width, height: image.height});
  ctx.drawImage(image, 0, 0);
  for (const [color, line] of [["#ffffff", width / 40], ["#0b57c2", width / 70]]) {
    ctx.strokeStyle = color;
    ctx.lineWidth = line;
    ctx.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
}

/**
 * Curves over the layers.
 *
 * lines: [{number, values}], one value per layer that was read. layers: their numbers. depth: how
 * many layers the model has. at: index of the one that is shown. choose: is told a clicked index.
 */
export function chart(svg, lines, {layers, depth, at, choose}) {
  const width = svg.clientWidth, height = svg.clientHeight;
  const left = 50, right = 12, low = height - 38;
  if (!width) return;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const top = ceiling(Math.max(0, ...lines.flatMap((line) => line.values)));
  const x = (layer) => left + (width - left - right) * layer / Math.max(1, depth - 1);
  const y = (value) => low - (low - 12) * value / top;
  for (let i = 0; i <= 4; i++) {
    const value = top * i / 4;
    make("line", svg, {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)});
    make("text", svg, {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, percent(value));
  }
  const every = Math.max(1, Math.ceil(depth / ((width - left) / 34)));
  for (let layer = 0; layer < depth; layer += every)
    make("text", svg, {x: x(layer), y: low + 17, "text-anchor": "middle"}, layer);
  make("text", svg, {x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle"},
    "layer");
  const now = x(layers[at]);
  make("line", svg, {class: "now", x1: now, x2: now, y1: 8, y2: low});
  for (const {number, values} of lines) {
    const points = values.map((value, i) => `${x(layers[i])},${y(value)}`).join(" ");
    make("polyline", svg, {class: `curve line${number}`, points});
    make("circle", svg, {class: `dot line${number}`, cx: now, cy: y(values[at]), r: 4.5});
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
