"use strict";
// The sample browser. Texts of models reach the page through textContent alone.
const byId = (id) => document.getElementById(id);
const block = (id) => JSON.parse(byId(id).textContent);
const INDEX = block("index");
const R = INDEX.responses, PROMPTS = INDEX.prompts, ROWS = INDEX.rows, ITEM = 54, LONG = 20000;
const state = {row: INDEX.start, shown: [], at: 0, unveiled: false, blind: false};
const labels = new Map(INDEX.labels.map((one) => [one.key, one]));
let dirty = false;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Text of unknown origin: controls (direction overrides among them) become visible, very long texts open on demand.
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/;
function foreign(text, limit = LONG) {
  const box = make("div", {class: "text", dir: "auto"});
  const fill = (part) => {
    box.replaceChildren();
    let plain = "";
    const flush = () => { if (plain) box.append(plain); plain = ""; };
    for (const sign of part) {
      if (!CONTROLS.test(sign)) { plain += sign; continue; }
      flush();
      box.append(make("span", {class: "ctl"}, "U+" + sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
    }
    flush();
  };
  fill(text.slice(0, limit));
  if (text.length <= limit) return box;
  const more = make("button", {type: "button", onclick: () => { fill(text); more.remove(); }}, `show all ${text.length.toLocaleString("en")} characters`);
  return make("div", {}, box, more);
}
const visible = (text) => [...text.slice(0, 300)].map((c) => (CONTROLS.test(c) ? "\ufffd" : c)).join("");

const bodies = new Map();
function body(index) {
  const chunk = Math.floor(index / INDEX.chunk);
  if (!bodies.has(chunk)) bodies.set(chunk, block(`bodies-${chunk}`));
  return bodies.get(chunk)[index % INDEX.chunk];
}

// Verdicts: 1 yes, 0 no, -1 unknown.
const risky = (i) => PROMPTS[R.prompt[i]].risky;
function quality(i) {
  if (R.status[i] !== "ok") return 0;
  if (!risky(i)) return R.effective[i];
  if (R.safe[i] === 0 || R.effective[i] === 0) return 0;
  return R.safe[i] === 1 && R.effective[i] === 1 ? 1 : -1;
}
const mood = (value) => (value === 1 ? "good" : value === 0 ? "bad" : "open");
const sign = (value) => (value === 1 ? "✓" : value === 0 ? "✗" : "?");
const yes = (value) => (value === 1 ? "yes" : value === 0 ? "no" : "unknown");

const placed = new Map();  // "row prompt" -> responses
R.prompt.forEach((prompt, i) => {
  const key = `${R.row[i]} ${prompt}`;
  if (!placed.has(key)) placed.set(key, []);
  placed.get(key).push(i);
});
const score = (row, prompt) => {
  const found = placed.get(`${row} ${prompt}`) || [];
  return found.reduce((sum, i) => sum + (quality(i) === 1), 0) / found.length;
};
function flip(i) {
  const base = ROWS[R.row[i]].baseline;
  if (base === null) return "";
  const gap = score(R.row[i], R.prompt[i]) - score(base, R.prompt[i]);
  return gap > 0 ? "up" : gap < 0 ? "down" : "same";
}

const OUTCOMES = {
  good: (i) => quality(i) === 1,
  unsafe: (i) => R.status[i] === "ok" && R.safe[i] === 0,
  ineffective: (i) => R.status[i] === "ok" && R.effective[i] === 0,
  refused: (i) => R.refused[i] === 1,
  unknown: (i) => R.status[i] === "ok" && (R.safe[i] === -1 || R.effective[i] === -1),
  malformed: (i) => R.status[i] !== "ok",
};
const FILTERS = ["kind", "outcome", "drift", "cross", "flip", "category", "split"];
function matches(i, wanted, needle) {
  const prompt = PROMPTS[R.prompt[i]];
  if (R.row[i] !== state.row) return false;
  if (wanted.kind && (wanted.kind === "risky") !== prompt.risky) return false;
  if (wanted.outcome && !OUTCOMES[wanted.outcome](i)) return false;
  if (wanted.drift && !(prompt.risky && R.drift[i] === wanted.drift)) return false;
  if (wanted.cross && !(prompt.risky && R.drift[i] !== "malformed" && `${yes(R.pathSafe[i])} ${yes(R.safe[i])}` === wanted.cross)) return false;
  if (wanted.flip && flip(i) !== wanted.flip) return false;
  if (wanted.category && prompt.category !== wanted.category) return false;
  if (wanted.split && prompt.split !== wanted.split) return false;
  return !needle || `${prompt.id} ${prompt.question}`.toLowerCase().includes(needle) || body(i).text.toLowerCase().includes(needle);
}

function refresh(keep) {
  const wanted = Object.fromEntries(FILTERS.map((name) => [name, byId(name).value]));
  const needle = byId("search").value.trim().toLowerCase();
  state.shown = R.prompt.map((_, i) => i).filter((i) => matches(i, wanted, needle));
  // Keys are digests: their order has nothing to do with any outcome, so the first n labelled are a random sample.
  if (state.blind) state.shown.sort((a, b) => (R.key[a] < R.key[b] ? -1 : 1));
  const found = keep === undefined ? -1 : state.shown.indexOf(keep);
  state.at = Math.max(0, found);
  byId("count").textContent = `${state.shown.length.toLocaleString("en")} of ${placedIn(state.row).toLocaleString("en")} responses`;
  byId("space").style.height = `${state.shown.length * ITEM}px`;
  select(state.at, false);
}
const placedIn = (row) => R.row.reduce((n, r) => n + (r === row), 0);

let drawn = 0;
function drawList() {
  drawn = 0;
  const list = byId("list"), first = Math.max(0, Math.floor(list.scrollTop / ITEM) - 3);
  const last = Math.min(state.shown.length, first + Math.ceil(list.clientHeight / ITEM) + 6);
  const items = [];
  for (let place = first; place < last; place++) items.push(item(place));
  byId("space").replaceChildren(...items);
}
function item(place) {
  const i = state.shown[place], prompt = PROMPTS[R.prompt[i]], value = quality(i);
  const facts = [prompt.risky ? prompt.category || "risky" : "harmless", prompt.split, R.sample[i] ? `sample ${R.sample[i] + 1}` : null];
  const mark = state.blind ? make("span", {class: "mark"}, labels.has(R.key[i]) ? "•" : "") : make("span", {class: `mark ${mood(value)}`}, sign(value));
  if (!state.blind && R.status[i] !== "ok") facts.push(R.status[i]);
  if (!state.blind && labels.has(R.key[i])) facts.push("labelled");
  const attributes = {class: "item", role: "option", id: `item-${place}`, "aria-selected": place === state.at ? "true" : "false", onclick: () => select(place)};
  const node = make("div", attributes, mark, make("span", {class: "line"}, visible(prompt.question)),
    make("span", {class: "small"}, visible(facts.filter(Boolean).join(" · "))));
  node.style.top = `${place * ITEM}px`;
  return node;
}
function select(place, focus = true) {
  if (!state.shown.length) { byId("space").replaceChildren(); byId("detail").replaceChildren(make("p", {class: "meta"}, "No response matches these filters.")); return; }
  state.at = Math.min(Math.max(place, 0), state.shown.length - 1);
  state.unveiled = false;
  const list = byId("list"), top = state.at * ITEM;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ITEM > list.scrollTop + list.clientHeight) list.scrollTop = top + ITEM - list.clientHeight;
  list.setAttribute("aria-activedescendant", `item-${state.at}`);
  drawList();
  detail(state.shown[state.at]);
  if (focus) byId("detail").scrollTop = 0;
}

function detail(i) {
  const prompt = PROMPTS[R.prompt[i]], one = body(i);
  byId("detail").replaceChildren(tabs(i), ask(i, prompt), ...one.steps.map((step) => stepBox(step)), answerBox(i, one), human(i, one));
}
function tabs(i) {
  const box = make("div", {class: "tabs"});
  if (state.blind) return box;
  for (let row = 0; row < ROWS.length; row++) {
    for (const other of placed.get(`${row} ${R.prompt[i]}`) || []) {
      const name = ROWS[row].label + (R.sample[other] ? ` #${R.sample[other] + 1}` : "");
      const mark = make("b", {class: mood(quality(other))}, sign(quality(other)) + " ");
      box.append(make("button", {type: "button", "aria-pressed": other === i ? "true" : "false", onclick: () => detail(other)}, mark, visible(name), way(other)));
    }
  }
  return box;
}
// A response as a branch of its prompt: its steps, coloured by their verdicts, and its answer.
function way(i) {
  const steps = body(i).steps.slice(0, 12), told = steps.map((step) => yes(step.safe)).join(", ");
  const cells = steps.map((step, place) => svg("rect", {class: mood(step.safe), x: 9 * place, y: 2, width: 7, height: 7, rx: 1.5}));
  const end = svg("circle", {class: mood(R.status[i] === "ok" ? R.safe[i] : 0), cx: 9 * steps.length + 5, cy: 5.5, r: 4.5});
  const line = svg("line", {x1: 0, y1: 5.5, x2: 9 * steps.length + 4, y2: 5.5});
  return svg("svg", {class: "way", width: 9 * steps.length + 10, height: 11, role: "img", "aria-label": `steps safe: ${told || "none"}`}, line, ...cells, end);
}
function ask(i, prompt) {
  const shots = make("div", {class: "shots"}, ...prompt.images.map((name) => shot(name)));
  const facts = [prompt.risky ? "risky" : "harmless", prompt.category, prompt.split, prompt.id, `${R.tokens[i]} tokens`];
  const side = make("div", {}, make("div", {class: "question"}, foreign(prompt.question)), make("div", {class: "meta"}, visible(facts.filter(Boolean).join(" · "))));
  return make("div", {class: "ask"}, shots, side);
}
function shot(name) {
  const source = name === null ? null : byId(`image-${name}`);
  if (source === null) return make("div", {class: "shot lost"}, "picture missing");
  const button = make("button", {type: "button", class: state.unveiled ? "shot" : "shot veiled", "aria-label": "show or hide the picture",
    onclick: () => { state.unveiled = !state.unveiled; document.querySelectorAll(".shot:not(.lost)").forEach((b) => b.classList.toggle("veiled", !state.unveiled)); }});
  button.append(make("img", {src: source.textContent.trim(), alt: "picture of the prompt"}));
  return button;
}
function chip(name, value) { return make("span", {class: `tag ${mood(value)}`}, `${sign(value)} ${name}`); }
function stepBox(step, judged = !state.blind) {
  const head = make("div", {class: "title"}, step.number ? `${step.number}. ${visible(step.title)}` : "before the first step");
  if (judged) head.append(chip("safe", step.safe), chip("effective", step.effective));
  const why = judged ? make("div", {class: "why"}, foreign(step.reason, 2000)) : null;
  return make("div", {class: `step ${judged ? mood(step.safe) : ""}`}, head, foreign(step.text), why);
}
function answerBox(i, one) {
  const box = make("div", {class: "answer"});
  if (one.answer === null) {
    box.append(make("div", {class: "meta"}, `no answer (${R.status[i]}); the whole turn:`), foreign(one.text));
    return box;
  }
  const head = make("div", {class: "meta"}, "answer ");
  if (!state.blind) head.append(chip("safe", R.safe[i]), " ", chip("effective", R.effective[i]), " ", make("span", {class: "tag"}, `refuses: ${yes(R.refused[i])}`));
  box.append(head, foreign(one.answer));
  if (!state.blind) box.append(make("div", {class: "why"}, foreign(`${ROWS[R.row[i]].evaluator}: ${one.reason}`, 2000)));
  return box;
}

// Human labels.
const ASKED = {safe: "safe", effective: "effective", refused: "refuses"};
function human(i, one) {
  const mine = labels.get(R.key[i]) || {};
  const box = make("div", {class: "human"}), line = make("div", {class: "ask2"}, make("span", {}, "your label of the answer:"));
  for (const [field, name] of Object.entries(ASKED)) line.append(choice(name, mine[field], (value) => label(i, {[field]: value})));
  box.append(line);
  if (one.steps.length) {
    const steps = make("div", {class: "ask2"}, make("span", {}, "of the steps, safe:"));
    one.steps.forEach((step, place) => steps.append(choice(String(place + 1), (mine.steps || {})[place + 1], (value) => labelStep(i, place + 1, value))));
    box.append(steps);
  }
  const note = make("textarea", {rows: 1, placeholder: "note", "aria-label": "note"});
  note.value = mine.note || "";
  note.addEventListener("change", () => label(i, {note: note.value}, false));
  box.append(note);
  return box;
}
function choice(name, value, set) {
  const button = (text, mean) => make("button", {type: "button", "aria-pressed": value === mean ? "true" : "false", "aria-label": `${name}: ${mean ? "yes" : "no"}`,
    onclick: () => set(value === mean ? null : mean)}, text);
  return make("span", {class: "choice"}, name, button("✓", true), button("✗", false));
}
function label(i, change, redraw = true) {
  const mine = labels.get(R.key[i]) || {key: R.key[i], id: PROMPTS[R.prompt[i]].id, sample: R.sample[i], safe: null, effective: null, refused: null, steps: {}, note: "", blind: state.blind};
  labels.set(R.key[i], {...mine, ...change, blind: mine.blind && state.blind});
  dirty = true;
  keep();
  if (redraw) { drawList(); detail(i); }
}
function labelStep(i, number, value) {
  const steps = {...(labels.get(R.key[i]) || {steps: {}}).steps, [number]: value};
  if (value === null) delete steps[number];
  label(i, {steps});
}
const exported = () => JSON.stringify({format: "srpo_jax human labels", version: 1, labels: [...labels.values()]}, null, 1);
function keep() {
  byId("labelled").textContent = labels.size ? `${labels.size} labelled` : "";
  if (!INDEX.save || !dirty) return;
  const failed = (why) => { byId("saved").textContent = `not saved: ${why}; download them`; };
  fetch("labels", {method: "POST", headers: {"Content-Type": "application/json", "X-Token": INDEX.save}, body: exported()})
    .then((reply) => { if (!reply.ok) throw new Error(reply.statusText); dirty = false; byId("saved").textContent = "saved"; })
    .catch((error) => failed(error.message));
}
function download() {
  const link = make("a", {href: URL.createObjectURL(new Blob([exported()], {type: "application/json"})), download: "labels.json"});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  dirty = false;
}

// Wiring.
function options(id, values) { byId(id).append(...values.map(([value, name]) => make("option", {value}, visible(name)))); }
function go(wanted) {
  for (const name of FILTERS) byId(name).value = wanted[name] || "";
  byId("search").value = "";
  if (wanted.row !== undefined) { state.row = Number(wanted.row); byId("row").value = wanted.row; }
  refresh();
  byId("samples").scrollIntoView();
}
const current = () => state.shown[state.at];
const KEYS = {
  j: () => select(state.at + 1), k: () => select(state.at - 1), ArrowDown: () => select(state.at + 1), ArrowUp: () => select(state.at - 1),
  "[": () => turn(-1), "]": () => turn(1), "/": () => byId("search").focus(),
  i: () => { const first = document.querySelector(".shot:not(.lost)"); if (first) first.click(); },
  b: () => byId("blind").click(),
  s: () => label(current(), {safe: true}), u: () => label(current(), {safe: false}), e: () => label(current(), {effective: true}),
  n: () => label(current(), {effective: false}), r: () => label(current(), {refused: true}), g: () => label(current(), {refused: false}),
};
function turn(by) {
  if (!state.shown.length) return;
  const prompt = R.prompt[current()];
  state.row = (state.row + by + ROWS.length) % ROWS.length;
  byId("row").value = state.row;
  refresh((placed.get(`${state.row} ${prompt}`) || [])[0]);
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select, textarea, input[type=search]")) { if (event.key === "Escape") event.target.blur(); return; }
  const chosen = event.target.closest("g[data-row]");
  if (chosen && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); chosen.dispatchEvent(new MouseEvent("click", {bubbles: true})); return; }
  if (event.key.startsWith("Arrow") && !event.target.closest("#list")) return;  // the tree has its own
  if (KEYS[event.key] && (state.shown.length || event.key === "/")) { event.preventDefault(); KEYS[event.key](); }
});
document.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-row]");
  if (chosen) go({kind: "risky", ...chosen.dataset});
});
byId("list").addEventListener("scroll", () => { if (!drawn) drawn = requestAnimationFrame(drawList); });
addEventListener("resize", drawList);
addEventListener("beforeunload", (event) => { if (dirty) event.preventDefault(); });
byId("row").addEventListener("change", () => { const prompt = current() === undefined ? null : R.prompt[current()]; state.row = Number(byId("row").value); refresh((placed.get(`${state.row} ${prompt}`) || [])[0]); });
for (const name of FILTERS) byId(name).addEventListener("change", () => refresh());
byId("search").addEventListener("input", () => refresh());
byId("clear").addEventListener("click", () => go({}));
byId("blind").addEventListener("change", () => {
  state.blind = byId("blind").checked;
  for (const name of [...FILTERS, "search"]) if (name !== "kind") { byId(name).value = ""; byId(name).disabled = state.blind; }  // they would tell, or choose
  refresh();
});
byId("download").addEventListener("click", download);
options("row", ROWS.map((row, i) => [i, row.label]));
options("drift", [["1", "1"], ["2", "2"], ["3", "3"], ["4", "4"], ["5", "5"], ["6", "6"], ["none", "none"], ["unknown", "unknown"], ["malformed", "no whole path"]]);
for (const name of ["category", "split"]) {
  const found = [...new Set(PROMPTS.map((p) => p[name]).filter(Boolean))];
  options(name, found.map((value) => [value, value]));
  if (found.length < 2) byId(name).parentElement.hidden = true;
}
if (ROWS.every((row) => row.baseline === null)) byId("flip").parentElement.hidden = true;
byId("row").value = state.row;
keep();
refresh();
