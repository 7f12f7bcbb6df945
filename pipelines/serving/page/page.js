"use strict";
// The page of the service: asks /search with an image or an id of the index, and shows the answers, each a button that searches on.

const $ = (id) => document.getElementById(id);
let indexes = [];        // what /about tells
let asked = null;        // the last query: {file} or {id, index}
let turn = 0;            // counts queries, so that a late answer does not replace a newer one
let seed = 1 + Math.floor(Math.random() * 1e6);

class Fault extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const secret = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(secret ? { Authorization: `Bearer ${secret}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Fault("The service does not answer.");
  }
  if (response.status === 401) {
    sessionStorage.removeItem("token");
    $("token").hidden = false;
    $("secret").focus();
    throw new Fault(secret ? "The token is not the service's." : "");
  }
  if (response.ok) return response;
  const reason = await response.json().then((told) => told.error, () => response.statusText);
  throw new Fault(reason || `The service answered ${response.status}.`, response.status);
}

// A path's slashes stay slashes, all else is escaped: ids are paths of images.
const imagePath = (id, index) => `/image/${encodeURIComponent(id).replaceAll("%2F", "/")}?index=${encodeURIComponent(index)}`;

function showBlob(image, blob) {
  const url = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}

async function show(image, id, index) {
  try {
    showBlob(image, await (await call(imagePath(id, index))).blob());
  } catch {
    image.alt = "no picture";
  }
}

function option(select, value, text = value) {
  select.append(new Option(text, value));
}

// A picture of the index as a button that searches with it.
function card(row, index) {
  const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
  const name = row.class || "no class", far = "distance" in row ? `distance ${row.distance}` : row.domain;
  button.type = "button";
  button.title = row.id;
  button.setAttribute("aria-label", `${name}, ${far || "image"}, ${row.id}: search with it`);
  image.alt = "";
  show(image, row.id, index);
  button.append(image);
  for (const text of [name, far]) {
    const line = document.createElement("span");
    line.textContent = text;
    button.append(line);
  }
  button.addEventListener("click", () => {
    history.pushState({ id: row.id, index }, "");
    ask({ id: row.id, index });
  });
  item.append(button);
  return item;
}

const chosen = () => indexes.find((each) => each.index === $("index").value) || indexes[0];

async function search(index, name, value) {
  const form = new FormData();
  form.append(name, value);
  for (const each of ["k", "label", "domain"]) if ($(each).value) form.append(each, $(each).value);
  form.append("index", index);
  return (await call("/search", { method: "POST", body: form })).json();
}

// An index that lacks the image is searched with its picture, which is smaller than the image: the answer says so.
async function answer(index) {
  if (asked.file) return search(index, "image", asked.file);
  try {
    return await search(index, "id", asked.id);
  } catch (error) {
    if (error.status !== 404 || index === asked.index) throw error;
    const picture = await (await call(imagePath(asked.id, asked.index))).blob();
    return { ...await search(index, "image", picture), byPicture: true };
  }
}

async function ask(query) {
  if (query) asked = query;
  if (!asked) return;
  const mine = ++turn, wanted = $("compare").checked ? indexes : [chosen()];
  $("error").textContent = "";
  $("status").textContent = "Searching …";
  $("query").hidden = true;
  $("asked").textContent = asked.file ? asked.file.name || "pasted image" : asked.id;
  if (asked.file) showBlob($("query"), asked.file);
  else show($("query"), asked.id, asked.index);
  try {
    const begun = performance.now();
    const found = await Promise.all(wanted.map((each) => answer(each.index)));
    if (mine !== turn) return;
    const all = Math.round(performance.now() - begun);
    $("results").className = found.length > 1 ? "two" : "";
    $("results").replaceChildren(...found.map(results));
    $("status").textContent = `${found.map((each) => each.queries[0].answers.length).join(" + ")} answers in ${all} ms.`;
  } catch (error) {
    if (mine !== turn) return;
    $("status").textContent = "";
    $("results").replaceChildren();
    $("error").textContent = error.message;
  }
}

function results(found) {
  const part = document.createElement("section"), title = document.createElement("h2"), times = document.createElement("p"), list = document.createElement("ul");
  title.textContent = `${found.index}: ${found.model}`;
  times.className = "small";
  times.textContent = `encoded in ${found.milliseconds.encode.toFixed(1)} ms, searched in ${found.milliseconds.search.toFixed(1)} ms, version ${found.version}`
    + (found.byPicture ? "; searched with the small picture, as this index lacks the image" : "");
  list.className = "pictures";
  list.append(...found.queries[0].answers.map((row) => card(row, found.index)));
  part.append(title, times, list);
  return part;
}

async function sample() {
  const index = chosen(), given = new URLSearchParams({ index: index.index, count: 16, seed: seed++, label: $("label").value, domain: $("domain").value });
  try {
    const { ids } = await (await call(`/ids?${given}`)).json();
    $("samples").replaceChildren(...ids.map((row) => card(row, index.index)));
  } catch (error) {
    $("error").textContent = error.message;
  }
}

function filters() {
  const index = chosen();
  for (const [name, values] of [["label", index.classes], ["domain", index.domains]]) {
    const before = $(name).value;
    $(name).replaceChildren();
    option($(name), "", "any");
    for (const value of values) option($(name), value);
    $(name).value = values.includes(before) ? before : "";
    $(name).parentElement.hidden = values.length < 2;
  }
}

async function start() {
  try {
    indexes = (await (await call("/about")).json()).indexes;
  } catch (error) {
    $("error").textContent = error.message;
    return;
  }
  $("token").hidden = true;
  $("error").textContent = "";
  $("about").textContent = indexes.map((each) => `${each.index}: ${each.codes.toLocaleString("en")} images, ${each.bits} bits`).join("; ");
  $("index").replaceChildren();
  for (const each of indexes) option($("index"), each.index);
  $("chooses").hidden = $("compares").hidden = indexes.length < 2;
  $("drop").hidden = !indexes.some((each) => each.images);
  filters();
  $("ask").hidden = $("sample").hidden = false;
  sample();
}

function take(list) {
  const files = [...list], file = files.find((each) => each.type.startsWith("image/")) || files[0];
  if (!file) return;
  history.pushState(null, "");
  ask({ file });
}

$("query").addEventListener("load", () => { $("query").hidden = false; });
$("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = "";  // so that the same file can be chosen again
});
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("secret").value);
  start();
});
$("others").addEventListener("click", sample);
$("index").addEventListener("change", () => { filters(); sample(); ask(); });
for (const name of ["label", "domain"]) $(name).addEventListener("change", () => { sample(); ask(); });
for (const name of ["k", "compare"]) $(name).addEventListener("change", () => ask());
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => take(event.clipboardData.files));
window.addEventListener("popstate", (event) => { if (event.state) ask(event.state); });
start();
