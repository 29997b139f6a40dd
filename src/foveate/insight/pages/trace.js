// A saved trace: all that it shows lies in the page's JSON.

const data = JSON.parse(find("data").textContent);
const shown = {layer: data.layers[data.start], token: data.runs[0].said > 1 ? -1 : 0, share: false};
const columns = data.runs.map(({method}, number) => addColumn(find("methods"), method, number));

function curves() {
  const key = shown.share ? "object_share" : data.measure;
  const whole = {layers: data.layers, depth: data.depth, at: data.layers.indexOf(shown.layer),
    choose: setLayer};
  const attention = columns.filter(({run}) => run[key]).map(({number, run}) =>
    ({number, values: mean(run[key], steps(run, shown.token))}));
  chart(find("attention"), attention,
    {...whole, format: data.largest && key === "on_image" ? String : percent});
  const every = Array.from({length: data.depth}, (_, layer) => layer);
  const uncertainty = columns.map(({number, run}) => {
    const chosen = steps(run, shown.token), stopped = chosen.filter((s) => run.stopped[s] !== null);
    return {number, layers: every, values: mean(run.uncertainty, chosen),
      limit: run.tested.length ? run.threshold : null,
      marks: stopped.map((s) => [run.stopped[s], run.uncertainty[s][run.stopped[s]]])};
  });
  chart(find("uncertainty"), uncertainty, {...whole, top: 1, format: (value) => value.toFixed(2)});
}

function show() {
  showColumns(columns, shown);
  for (const {run, words} of columns) {
    const chosen = steps(run, shown.token), at = data.layers.indexOf(shown.layer);
    const u = mean(run.uncertainty, chosen)[shown.layer].toFixed(2);
    const told = phrases(run, chosen, at, data.object, data.largest);
    words.textContent = `${[...told, `uncertainty ${u}`].join(", ")}.`;
  }
  curves();
  history.replaceState(null, "",
    `#layer=${shown.layer}&token=${shown.token < 0 ? "all" : shown.token}`);
}

function setLayer(index) {
  shown.layer = data.layers[index];
  show();
}

/** What the address says, as far as it is a layer and a token of this trace. */
function restore() {
  const said = new URLSearchParams(location.hash.slice(1)), layer = Number(said.get("layer") || NaN);
  if (data.layers.includes(layer)) shown.layer = layer;
  const token = said.get("token"), most = Math.max(...data.runs.map((run) => run.tokens.length));
  if (token === "all") shown.token = -1;
  else if (token !== null && Number(token) >= 0 && Number(token) < most) shown.token = +token;
}

restore();
find("layer").oninput = (event) => setLayer(Number(event.target.value));
find("heat").onchange = show;
for (const option of document.getElementsByName("measure"))
  option.onchange = () => { shown.share = option.value === "share" && option.checked; show(); };
const choose = (token) => { shown.token = token; show(); };
Promise.all(columns.map((column, at) => addRun(column, data.runs[at], data, choose))).then(() => {
  show();
  document.body.dataset.ready = "yes";
  addEventListener("resize", curves);
  addEventListener("hashchange", () => { restore(); show(); });
});
