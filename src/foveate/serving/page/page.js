// What is asked, what comes back, and what of it is shown. Text of users and models is only ever
// set as text.

import {call, pieces} from "./server.js";

const MOST = 6;  // methods side by side
const LINKED = 30000;  // characters of a picture that a link may hold
const PICTURE = /^data:image\/(png|jpeg|webp|gif|bmp|tiff);base64,[A-Za-z0-9+/=]+$/;

const form = {image: null, scene: null, known: []};  // the picture chosen, and what is known of it
const shown = {asked: null, columns: [], layer: null, token: -1, share: false};
let offer, running = new AbortController(), picking = 0;

// ---- the picture

function tell(text, failed = false) {
  find("told").textContent = text;
  find("told").classList.toggle("failed", failed);
}

/** A scene's number, or null for a picture of one's own. */
function setPicture(uri, about, scene = null) {
  Object.assign(form, {image: uri, scene, known: scene?.questions ?? []});
  const image = find("shown");
  image.hidden = false;
  image.onerror = () => { image.hidden = true; };  // a TIFF, which only the server can read
  image.alt = about;
  image.src = uri;
  find("about").textContent = about;
  for (const radio of document.getElementsByName("scene"))
    radio.checked = scene !== null && Number(radio.value) === scene.number;
  find("number").value = scene?.number ?? "";
  find("known").replaceChildren();
  for (const {text, thing} of form.known)
    make("button", find("known"), {type: "button"}, text).onclick = () => {
      find("question").value = text;
      setObject(thing ?? "");
    };
  const object = find("object"), before = object.value;
  object.replaceChildren();
  make("option", object, {value: ""}, "the image");
  for (const thing of scene?.things ?? [])
    make("option", object, {value: thing}, `the ${thing}`);
  make("option", object, {value: "box"}, "a box");
  setObject(before === "box" ? "" : before);
}

function setObject(value) {
  const object = find("object");
  object.value = [...object.options].some((option) => option.value === value) ? value : "";
  find("box").hidden = object.value !== "box";
  find("frame").classList.toggle("boxes", object.value === "box");
  drawBox();
}

/** The box that is written, in fractions; null where it is none. */
function box() {
  const edges = find("box").value.split(/[\s,;%]+/).filter(Boolean).map((n) => Number(n) / 100);
  const [left, top, right, bottom] = edges;
  const fits = edges.length === 4 && edges.every((edge) => edge >= 0 && edge <= 1);
  return fits && left < right && top < bottom ? edges : null;
}

function drawBox() {
  const mark = find("mark"), edges = box();
  mark.hidden = find("object").value !== "box" || !edges || find("shown").hidden;
  if (mark.hidden) return;
  const [left, top, right, bottom] = edges.map((edge) => 100 * edge);
  Object.assign(mark.style, {left: `${left}%`, top: `${top}%`, width: `${right - left}%`,
    height: `${bottom - top}%`});
}

async function pickScene(number) {
  const turn = ++picking;
  try {
    const scene = await (await call(`explore/scenes/${number}`)).json();
    if (turn !== picking) return false;  // another picture has been chosen meanwhile
    setPicture(scene.image, `Drawn scene ${number}`, scene);
    return true;
  } catch (error) {
    tell(error.message, true);
    return false;
  }
}

function pickFile(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    tell(`${file.name} is not a picture: choose a PNG, JPEG or WebP.`, true);
    return;
  }
  const turn = ++picking, reader = new FileReader();
  reader.onload = () => {
    if (turn !== picking) return;
    tell("");
    setPicture(reader.result, file.name || "Pasted picture");
  };
  reader.readAsDataURL(file);
}

function listenToPictures() {
  find("file").onchange = (event) => {
    pickFile(event.target.files[0]);
    event.target.value = "";  // so that the same file can be chosen again
  };
  const drop = find("drop");
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    pickFile(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => pickFile(event.clipboardData.files[0]);
  find("number").onchange = (event) => event.target.value && pickScene(event.target.value);
  find("object").onchange = (event) => setObject(event.target.value);
  find("box").oninput = drawBox;

  const frame = find("frame");  // a box can be drawn, too
  frame.onpointerdown = (event) => {
    if (find("object").value !== "box" || find("shown").hidden) return;
    event.preventDefault();
    const within = frame.getBoundingClientRect(), clip = (v) => Math.min(100, Math.max(0, v));
    const place = ({clientX, clientY}) => [clip(100 * (clientX - within.left) / within.width),
      clip(100 * (clientY - within.top) / within.height)];
    const from = place(event);
    frame.setPointerCapture(event.pointerId);
    frame.onpointermove = (moved) => {
      const to = place(moved), ends = [0, 1].map((i) => [from[i], to[i]].sort((a, b) => a - b));
      find("box").value = [ends[0][0], ends[1][0], ends[0][1], ends[1][1]]
        .map((v) => Math.round(v)).join(", ");
      drawBox();
    };
    frame.onpointerup = frame.onpointercancel = () => { frame.onpointermove = null; };
  };
}

// ---- methods

function methodBoxes() {
  return [...find("methods").querySelectorAll("input")];
}

function addMethod(text, checked) {
  const known = methodBoxes().find((input) => input.value === text);
  if (known) {
    known.checked ||= checked;
    return;
  }
  const label = make("label", find("methods"), text.length > 14 ? {class: "long"} : {});
  const input = make("input", label, {type: "checkbox", value: text});
  input.checked = checked;
  make("span", label, {}, text);
}

/** Add what is written, once the server has read it; whether that went well. */
async function addStack() {
  const text = find("stack").value.trim();
  if (!text) return true;
  try {
    const said = await (await call(`explore/method?text=${encodeURIComponent(text)}`)).json();
    addMethod(said.method, true);
    find("stack").value = "";
    tell(`${said.method} is added.`);
    return true;
  } catch (error) {
    tell(error.message, true);
    return false;
  }
}

// ---- asking

/** What the form says; an Error where something is missing. */
function question() {
  const methods = methodBoxes().filter((input) => input.checked).map((input) => input.value);
  const text = find("question").value.trim(), object = find("object").value;
  const fail = (sentence) => { throw new Error(sentence); };
  if (!form.image) fail("There is no picture: choose one.");
  if (!text) fail("The question is empty: ask something about the picture.");
  if (!methods.length) fail("No method is chosen: choose vanilla for the model as it is.");
  if (methods.length > MOST) fail(`At most ${MOST} methods fit side by side: choose fewer.`);
  if (object === "box" && !box())
    fail("Draw the box on the picture, or write it like 10, 20, 40, 60: left, top, right, bottom "
      + "in percent.");
  return {
    image: form.image,
    scene: form.scene?.number ?? null,
    question: text,
    truth: form.known.find((known) => known.text === text)?.answer ?? null,
    methods,
    tokens: Number(find("tokens").value),
    object,
    box: object === "box" ? box() : null,
  };
}

async function ask() {
  let asked;
  const busy = !find("stop").hidden;
  find("stop").hidden = false;
  try {
    if (await addStack()) asked = question();
  } catch (error) {
    tell(error.message, true);
  }
  if (!asked) {
    find("stop").hidden = !busy;
    return;
  }
  running.abort();
  const own = running = new AbortController();
  tell("");
  Object.assign(shown, {asked, columns: [], share: false});
  find("asked").hidden = false;
  find("asked").textContent = asked.question;
  find("truth").hidden = asked.truth === null;
  find("truth").textContent = `Known answer: ${asked.truth}`;
  find("answers").replaceChildren();
  for (const part of ["controls", "curves", "reading"]) find(part).hidden = true;
  find("measures").hidden = !asked.object;
  document.getElementsByName("measure")[0].checked = true;
  find("measured").textContent = `Attention to ${objectName(asked)}, by layer`;
  shown.columns = asked.methods.map(column);
  keepLink();
  find("stop").hidden = false;
  const results = find("results"), {top} = results.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 3) results.scrollIntoView();
  await Promise.all(shown.columns.map((one) => answer(one, asked, own.signal)));
  if (own === running) find("stop").hidden = true;
}

function objectName({object}) {
  return object === "box" ? "the box" : object ? `the ${object}` : "the image";
}

function column(method, number) {
  const one = addColumn(find("answers"), method, number);
  const answer = {class: "answer", "aria-live": "polite", "aria-busy": "true"};
  return Object.assign(one, {
    answer: make("p", one.article, answer),
    state: make("p", one.article, {class: "state"}, "waits for the model"),
  });
}

/** Stream an answer, then fetch its maps. */
async function answer(one, asked, signal) {
  const about = {method: one.method, max_tokens: asked.tokens};
  try {
    const content = [{type: "image_url", image_url: {url: asked.image}},
      {type: "text", text: asked.question}];
    const stream = await call("v1/chat/completions",
      {...about, model: offer.model, stream: true, messages: [{role: "user", content}]}, signal);
    one.state.textContent = "answers";
    let end = "";
    for await (const {delta, finish_reason: reason} of pieces(stream)) {
      one.answer.textContent += delta.content ?? "";
      one.answer.classList.toggle("long", one.answer.textContent.length > 40);
      if (reason === "length") end = `Cut off after ${asked.tokens} tokens.`;
    }
    one.answer.setAttribute("aria-busy", "false");
    one.state.textContent = "its attention is read";
    const object = asked.box ? {box: asked.box} : asked.object
      ? {thing: asked.object, scene: asked.scene} : {};
    const data = await (await call("explore/trace",
      {...about, ...object, image: asked.image, question: asked.question}, signal)).json();
    await addRun(one, data.runs[0], data, (token) => { shown.token = token; show(); });
    if (!data.layers.includes(shown.layer)) shown.layer = data.layers[data.start];
    const {probability} = data.runs[0];
    const sure = probability === null ? "" : `probability ${probability.toFixed(2)}`;
    one.state.textContent = [sure, end].filter(Boolean).join(". ");
    one.state.hidden = !one.state.textContent;
    if (data.unknown.length)
      tell(`The model does not know ${data.unknown.join(", ")}: it reads a gap there.`, true);
    show();
  } catch (error) {
    one.answer.setAttribute("aria-busy", "false");
    one.state.textContent = signal.aborted ? "stopped" : error.message;
    one.state.classList.toggle("failed", !signal.aborted);
  }
}

// ---- showing

function show() {
  const columns = shown.columns.filter((one) => one.run);
  if (!columns.length) return;
  for (const part of ["controls", "curves", "reading"]) find(part).hidden = false;
  showColumns(columns, shown);
  const {layers, depth} = columns[0], at = layers.indexOf(shown.layer);
  const object = shown.asked.object ? objectName(shown.asked) : null;
  for (const {run, words} of columns)
    words.textContent = `${phrases(run, steps(run, shown.token), at, object).join(", ")}.`;
  legend(find("legend"), find("chart"), columns.map(({number, method}) => ({number, name: method})));
  const key = !object ? "on_image" : shown.share ? "object_share" : "on_object";
  const lines = columns.filter(({run}) => run[key])
    .map(({run, number}) => ({number, values: mean(run[key], steps(run, shown.token))}));
  chart(find("chart"), lines, {layers, depth, at, choose: setLayer});
  keepLink();
}

function setLayer(index) {
  shown.layer = shown.columns.find((one) => one.run).layers[index];
  show();
}

// ---- links

let late;

/** Write the link into the page's address, soon: browsers allow it only so often. */
function keepLink() {
  clearTimeout(late);
  late = setTimeout(writeLink, 200);
}

/** The address of the page says all that is shown; a picture only where it is small. */
function writeLink() {
  const {asked, layer, token} = shown, said = new URLSearchParams();
  if (asked.scene !== null) said.set("scene", asked.scene);
  else if (asked.image.length <= LINKED) said.set("image", asked.image);
  said.set("q", asked.question);
  for (const method of asked.methods) said.append("m", method);
  if (asked.box) said.set("object", asked.box.map((edge) => Math.round(100 * edge)).join());
  else if (asked.object) said.set("object", asked.object);
  said.set("tokens", asked.tokens);
  if (layer !== null) said.set("layer", layer);
  said.set("token", token < 0 ? "all" : token);
  history.replaceState(null, "", `#${said}`);
}

async function copyLink() {
  if (!shown.asked) {
    tell("Ask something first: the link is to what is shown.", true);
    return;
  }
  const whole = shown.asked.scene !== null || shown.asked.image.length <= LINKED;
  writeLink();
  const rest = whole ? "" : " The picture is too large for it: whoever opens it chooses it again.";
  try {
    await navigator.clipboard.writeText(location.href);
    tell(`The link is copied.${rest}`);
  } catch {  // browsers refuse where the page did not come over https or from this machine
    tell(`The address of this page is the link: copy it there.${rest}`);
  }
}

/** Fill the form as the address says, and ask; false where it says nothing. */
async function restore() {
  const said = new URLSearchParams(location.hash.slice(1));
  if (!said.has("q")) return false;
  const image = said.get("image");
  let whole = false;
  if (said.has("scene")) whole = await pickScene(said.get("scene"));
  else if (image && PICTURE.test(image)) {
    picking++;
    setPicture(image, "The picture of the link");
    whole = true;
  }
  find("question").value = said.get("q");
  find("tokens").value = said.get("tokens") ?? find("tokens").value;
  for (const input of methodBoxes()) input.checked = false;
  for (const method of said.getAll("m")) addMethod(method, true);
  const object = said.get("object") ?? "", isBox = object.includes(",");
  if (isBox) find("box").value = object.split(",").join(", ");
  setObject(isBox ? "box" : object);
  const layer = Number.parseInt(said.get("layer")), token = Number.parseInt(said.get("token"));
  Object.assign(shown, {layer: layer >= 0 ? layer : null, token: token >= 0 ? token : -1});
  if (whole) await ask();
  else if (!find("told").textContent)
    tell("The link does not hold its picture: choose it, then ask.");
  return true;
}

// ---- start

function fill() {
  find("model").textContent = offer.model;
  document.title = `foveate: ${offer.model}`;
  find("tokens").max = offer.tokens;
  find("tokens").value = Math.min(find("tokens").value, offer.tokens);
  find("number").max = offer.last;
  for (const {name, about, paper, parameters, details} of offer.methods) {
    addMethod(name, name === "vanilla" || name === "clvs");
    make("dt", find("explained"), {}, paper ? `${name} (arXiv ${paper})` : name);
    const told = make("dd", find("explained"), {}, `${about} `);
    const values = Object.entries(parameters ?? {}).map(([key, value]) => `${key}=${value}`);
    if (values.length) make("code", told, {}, values.join(", "));
    if (details) make("p", told, {class: "soft"}, details);
  }
  for (const {number, image, about} of offer.scenes) {
    const label = make("label", find("scenes"));
    make("input", label, {type: "radio", name: "scene", value: number}).onchange =
      () => pickScene(number);
    make("img", label, {src: image, alt: about, title: about, width: 96, height: 96});
  }
}

function listen() {
  listenToPictures();
  find("form").onsubmit = (event) => {
    event.preventDefault();
    if (shown.asked) shown.token = -1;  // else it is a link's
    ask();
  };
  find("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("form").requestSubmit();
  };
  find("stop").onclick = () => {
    running.abort();
    find("ask").focus();  // the button that had the focus goes away
  };
  find("link").onclick = copyLink;
  find("add").onclick = addStack;
  find("stack").onkeydown = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    addStack();
  };
  find("layer").oninput = (event) => setLayer(Number(event.target.value));
  find("heat").onchange = show;
  for (const option of document.getElementsByName("measure"))
    option.onchange = () => { shown.share = option.value === "share" && option.checked; show(); };
  addEventListener("resize", show);
  addEventListener("hashchange", restore);
}

try {
  offer = await (await call("explore/start")).json();
  fill();
  listen();
  if (!await restore() && await pickScene(0)) {
    const first = form.known.find(({thing}) => thing) ?? form.known[0];
    find("question").value = first.text;
    setObject(first.thing ?? "");
  }
} catch (error) {
  tell(error.message, true);
}
document.body.dataset.ready = "yes";
