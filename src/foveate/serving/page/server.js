// The server: requests, the key that it may want, and streamed answers.

/** Fetch; a refusal becomes an Error with the server's sentence. */
export async function call(path, body, signal) {
  const options = body && {method: "POST", body: JSON.stringify(body)};
  for (;;) {
    const headers = {"Content-Type": "application/json"}, key = sessionStorage.getItem("key");
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, {...options, headers, signal});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer: is it still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) {
      const told = await response.json().catch(() => null);
      throw new Error(told?.error?.message ?? `The server answers ${response.status}.`);
    }
    if (key === sessionStorage.getItem("key")) await newKey(key !== null);
  }
}

let asking = null;  // one dialog, however many wait for it

function newKey(again) {
  asking ??= new Promise((done, refuse) => {
    const door = find("door");
    find("wanted").textContent = again ? "The server does not know this key: try another."
      : "This server wants an API key.";
    find("key").value = "";
    find("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", find("key").value);
      door.close("given");
    };
    find("leave").onclick = () => door.close("left");
    door.onclose = () => door.returnValue === "given" ? done()
      : refuse(new Error("The server wants an API key: load the page again to give one."));
    door.returnValue = "";
    door.showModal();
  }).finally(() => { asking = null; });
  return asking;
}

/** The pieces of a streamed answer, as choices of OpenAI's format. */
export async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.choices.length) yield chunk.choices[0];
    }
  }
}
