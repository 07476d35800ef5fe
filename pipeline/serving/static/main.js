// The form around the conversations: what is asked for, start and stop, grades, files, links.
import { hasOpus } from "./opus.js";
import { Microphone, RATE, wavFile } from "./sound.js";
import { Pane } from "./pane.js";
import { Talk } from "./talk.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = ["text_temperature", "text_topk", "audio_temperature", "audio_topk"];
const LOADING_MS = 2_000;
const AUDIO_KEYS = { voice_prompt: "voice", greeting: "greeting" };

// The server turned a token or pass of the URL into a cookie before this page came. Of another
// server, `?with=URL`, the token stays in its URL and in memory; it must be a friend of this one,
// or any link could send what you say to a stranger.
const query = new URLSearchParams(location.search);
const here = location.origin + location.pathname.replace(/\/$/, "");
const servers = [{ base: here, headers: {}, query: {} }];
const panes = [];
let talks = [], last = [], context = null, microphone = null;
let cut = "";  // why the prompt of the URL is not whole

function otherServer(address) {
  const url = new URL(address, location.href), token = url.searchParams.get("token");
  return {
    base: url.origin + url.pathname.replace(/\/$/, ""),
    headers: token === null ? {} : { Authorization: "Bearer " + token },
    query: token === null ? {} : { token },
  };
}

// A server answers before it has loaded its model: that it has not is said, and asked for again.
async function describe(server, number = 0) {
  for (let waited = false; ; waited = true) {
    const response = await fetch(server.base + "/api/info", { headers: server.headers });
    if (response.status !== 503) {
      if (!response.ok) throw new Error(await response.text());
      if (waited) panes[number].show("Not connected.");
      return response.json();
    }
    panes[number].show("The model is being loaded …");
    await new Promise((done) => { setTimeout(done, LOADING_MS); });
  }
}

async function begin() {
  $("prompt").value = (query.get("text_prompt") || "").trim();
  panes.push(new Pane($("panes"), ""));
  let stranger = "";
  try {
    servers[0].info = await describe(servers[0]);
    if (query.get("with")) {
      const other = otherServer(query.get("with"));
      if ((servers[0].info.friends || []).includes(new URL(other.base).origin)) {
        servers.push(other);
        panes.push(new Pane($("panes"), "…"));
      } else stranger = `This server does not know ${other.base}: start it with --friend ${new URL(other.base).origin} to talk to both.`;
    }
  } catch { /* said below */ }
  for (const key of [...SAMPLING, "seed"]) if (query.get(key)) $(key).value = query.get(key);
  const opus = await hasOpus();
  const near = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);  // bytes cost nothing
  $("format").value = opus && (query.get("format") || (near ? "pcm" : "opus")) === "opus" ? "opus" : "pcm";
  $("format").querySelector("[value=opus]").disabled = !opus;
  const found = await Promise.allSettled(servers.map(describe));
  found.forEach((one, number) => {
    if (one.status === "rejected") return panes[number].show(String(one.reason.message || one.reason), "bad");
    const info = one.value;
    servers[number].info = info;
    panes[number].part("title").textContent = `${info.label || "model"} ${info.model_digest.slice(0, 12)}`;
  });
  panes.forEach((pane) => { pane.part("title").hidden = panes.length < 2; });
  if (stranger) panes[0].show(stranger, "bad");
  if (location.hash.length > 1 && query.has("text_prompt") && !(servers[0].info || {}).pass) {
    cut = `A # inside the prompt of a URL must be written %23: this one is cut before ${JSON.stringify(location.hash.slice(0, 40))}. Mend the prompt below, or the URL.`;
    panes[0].show(cut, "bad");
  }
  const info = servers[0].info;
  if (!info) return;
  $("model").textContent = [`${info.name} ${info.version}`, info.label, `model ${info.model_digest.slice(0, 12)}`,
    info.device, `${info.slots} at a time`].filter(Boolean).join(" · ");
  if (info.pass) practice(info.pass);
  else own(info);
  for (const key of SAMPLING) if (!$(key).value) $(key).value = info.sampling[key];
}

function practice(pass) {
  $("own").hidden = true;
  $("practice").hidden = false;
  $("practice").textContent = `${pass.name} waits for you. This link ends ${new Date(pass.expires * 1000).toLocaleString()}.`;
}

function own(info) {
  for (const [key, id] of Object.entries(AUDIO_KEYS)) {
    const wanted = query.get(key) || "";
    const names = new Set([...info.voices, ...(wanted ? [wanted] : [])]);
    if (!names.size) continue;
    $(id).replaceChildren(new Option(key === "greeting" ? "nothing yet" : "the model's own", ""),
      ...[...names].map((name) => new Option(name, name)));
    $(id).value = wanted;
    $(id + "-row").hidden = false;
  }
  $("prompt").addEventListener("input", () => { cut = ""; });
  $("share").hidden = !info.gives_links;
  if (!info.personas.length) return;
  $("persona-row").hidden = false;
  $("persona").replaceChildren(new Option("as written below", ""),
    ...info.personas.map((persona) => new Option(`${persona.name} (${persona.id})`, persona.id)));
  const same = info.personas.find((persona) => persona.text_prompt === $("prompt").value);
  if (same) $("persona").value = same.id;
  $("persona").onchange = () => {
    const persona = info.personas.find((one) => one.id === $("persona").value);
    if (!persona) return;
    cut = "";
    $("prompt").value = persona.text_prompt;
    for (const [key, id] of Object.entries(AUDIO_KEYS)) $(id).value = persona[key] || "";
  };
  $("prompt").oninput = () => { $("persona").value = ""; };
}

// What the URL says, with what the form says in its place; keys of the server's are not touched.
function wanted() {
  const asked = new URLSearchParams(query);
  for (const key of ["with", "token", "pass", "text_prompt", "seed", ...SAMPLING, ...Object.keys(AUDIO_KEYS)]) asked.delete(key);
  asked.set("format", $("format").value);
  if (servers[0].info && servers[0].info.pass) return asked;
  const set = (key, value) => { if (value) asked.set(key, value); };
  set("text_prompt", $("prompt").value.trim());
  for (const [key, id] of Object.entries(AUDIO_KEYS)) set(key, $(id).value || (servers[0].info ? "" : query.get(key)));
  for (const key of [...SAMPLING, "seed"]) set(key, $(key).value || query.get(key));
  return asked;
}

function buttons() {
  const busy = talks.length > 0;
  $("talk").disabled = $("listen").disabled = busy;
  $("stop").disabled = !busy;
  const over = !busy && last.some((talk) => talk.got.length);
  $("after").hidden = !over;
  $("kept").hidden = $("grades").hidden = !(over && servers[0].info && servers[0].info.takes_grades);
}

async function start(withMicrophone) {
  if (cut) return panes[0].show(cut, "bad");
  if (!window.isSecureContext) return panes.forEach((pane) => pane.show(
    "Browsers give microphones, and the sound that this page plays, to https and localhost only; this page came over plain http.", "bad"));
  const asked = wanted();
  // Of two models side by side, one seed: else they would differ by chance too.
  if (servers.length > 1 && !asked.get("seed")) asked.set("seed", Math.floor(Math.random() * 2 ** 32));
  const own = servers.map((server, number) => new Talk(server, asked, panes[number], ended));
  // What a grade and a file say is what was asked for now, whatever the form says by then.
  const held = { persona: $("persona").value, prompt: $("prompt").value.trim(), conversation: Date.now().toString(36) };
  own.forEach((talk) => Object.assign(talk, held));
  talks = [...own]; last = own;
  $("graded").textContent = $("note").value = "";
  $("which").hidden = servers.length < 2;
  document.querySelectorAll("#grades button").forEach((button) => button.setAttribute("aria-pressed", "false"));
  buttons();
  panes.forEach((pane) => { pane.reset(); pane.show(withMicrophone ? "Waiting for the microphone …" : "Starting …"); });
  const mine = new AudioContext({ sampleRate: RATE }), ear = new Microphone();
  context = mine; microphone = ear;
  try {
    await ear.start(mine, withMicrophone, (frame) => own.forEach((talk) => { if (!talk.ended) talk.send(frame); }));
    if (own.some((talk) => talk.ended)) return;  // stopped while the browser asked
    own.forEach((talk, number) => talk.start(mine, own.length > 1 ? 1.6 * number - 0.8 : 0));
  } catch (error) {
    if (own.some((talk) => talk.ended)) return;
    stop();
    const text = await unreachable() || `Could not start: ${error.message || error}`;
    panes.forEach((pane) => pane.show(text, "bad"));
  }
}

// Why this server gives nothing any more; nothing if it does.
async function unreachable() {
  try {
    const response = await fetch(here + "/api/info");
    return response.ok ? "" : "Refused: " + await response.text();
  } catch { return "The server does not answer."; }
}

function ended(talk) {
  talks = talks.filter((one) => one !== talk);
  if (!talks.length) {
    if (microphone) microphone.stop();
    if (context && context.state !== "closed") context.close();
  }
  buttons();
}

function stop() {
  [...talks].forEach((talk) => { talk.end(); talk.pane.show("Stopped."); });
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function save() {
  const stamp = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  last.forEach((talk, number) => {
    if (!talk.got.length) return;
    const info = talk.server.info || {}, name = `duplex-${info.label || "model"}-${stamp}${number ? "-2" : ""}`;
    const record = { ...talk.record(), model_digest: info.model_digest, label: info.label };
    if (!info.pass) record.text_prompt = talk.prompt;
    download(wavFile(talk.got, talk.sent), name + ".wav");
    download(new Blob([JSON.stringify(record, null, 2)], { type: "application/json" }), name + ".json");
  });
}

async function post(path, body) {
  const response = await fetch(here + path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

$("settings").onsubmit = (event) => { event.preventDefault(); if (!talks.length) start(true); };
$("listen").onclick = () => start(false);
$("stop").onclick = stop;
$("save").onclick = save;
$("grades").onclick = async (event) => {
  const grade = event.target.dataset.grade;
  if (!grade) return;
  const { persona, conversation, prompt, fed } = last[0];
  const body = { grade, note: $("note").value, persona, conversation, text_prompt: fed && fed.count ? prompt : "", ...last[0].record() };
  try {
    await post("/api/grades", body);
    event.target.setAttribute("aria-pressed", "true");
    $("graded").textContent = `Kept as ${grade}.`;
  } catch (error) { $("graded").textContent = String(error.message || error); }
};
$("make-link").onclick = async () => {
  const body = { name: $("link-name").value, hours: Number($("link-hours").value) };
  for (const [key, value] of wanted()) if (["text_prompt", "voice_prompt", "greeting"].includes(key)) body[key] = value;
  try { $("link").textContent = here + (await post("/api/links", body)).path; }
  catch (error) { $("link").textContent = String(error.message || error); }
};
window.onresize = () => panes.forEach((pane) => pane && pane.draw());
begin();
