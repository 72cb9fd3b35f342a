"use strict";
// Texts of records reach the page through textContent and value alone. Writes go to the server one after another, each with the
// version of the slate that it was made on; what the server refuses comes back under "Set aside".
const byId = (id) => document.getElementById(id);
const TOKEN = document.querySelector("meta[name=write-token]").content;
const PAUSE = 400, RETRY = 1500, GLANCE = 300;  // ms: typing to saving; between attempts; before a new record takes a decision
const SIGNS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]|[\u{e0000}-\u{e007f}]/gu;
const DECIDED = ["accepted", "edited", "rejected", "disturbing"];
let info, rows = [], shown = [], seen = 0;
let at = -1, view = null, edits = {}, note = "", problems = {}, unveiled = false, since = 0;
let dirty = false, timer = 0, chain = Promise.resolve(), writing = 0;
let revealAll = sessionStorage.getItem("reveal") === "yes";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const code = (sign) => "U+" + sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
const plain = (text, length = 4000) => String(text).slice(0, length).replace(SIGNS, (sign) => `[${code(sign)}]`) + (String(text).length > length ? " …" : "");
const several = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

let fading = 0;
function toast(text) {
  byId("toast").textContent = plain(text, 300);
  byId("toast").classList.add("on");
  clearTimeout(fading);
  fading = setTimeout(() => byId("toast").classList.remove("on"), 2500);
}
function saved(text, bad = false) {
  byId("saved").textContent = text;
  byId("saved").classList.toggle("bad", bad);
}

// Answers of the server; tries again until there is one.
async function ask(path, body) {
  const request = body === undefined ? {} : {method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json", "X-Review": TOKEN}};
  if (request.body && request.body.length < 60_000) request.keepalive = true;  // survives the page; browsers take no more
  for (;;) {
    try {
      const answer = await fetch(path, request);
      return {status: answer.status, ...(await answer.json())};
    } catch (error) {
      saved("Not saved: the server does not answer. Your text is kept here; trying again …", true);
      await wait(RETRY);
    }
  }
}

const same = (a, b) => {
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => key in b && a[key] === b[key]);
};
// What the server will make of the fields: texts without white space around them, and only what differs.
function tidy() {
  const told = {};
  for (const [name, text] of Object.entries(edits)) {
    const value = typeof text === "string" ? text.trim() : text;
    const empty = value === "" && (name === "unsafe_reply" || name === "category") ? null : value;
    if (empty !== view.fields[name]) told[name] = empty;
  }
  return told;
}

// One write of the record on show. Writes wait for each other, so that each knows the version that the one before it made.
function write(action) {
  clearTimeout(timer);
  const mine = view, index = mine.row.index;
  const body = {action, edits: tidy(), note};
  if (action === "draft") dirty = false;
  writing += 1;
  saved("saving …");
  const done = chain.then(async () => {
    const answer = await ask(`api/records/${index}`, {...body, version: mine.version, since: seen});
    writing -= 1;
    if (answer.rows) take(answer);
    const now = answer.view;
    if (!now) { dirty = true; saved(`Not saved: ${answer.error || answer.status}`, true); return false; }
    const wanted = {accept: ["accepted", "edited"], reject: ["rejected"], disturbing: ["disturbing"], skip: ["skipped"], draft: ["draft"], undo: ["draft"]}[action];
    // An answer that was lost on the way makes a second attempt look stale, though the first did all that was asked.
    const fine = answer.status === 200 || (same(now.edits, body.edits) && now.note === body.note && wanted.includes(now.row.mine));
    mine.version = now.version;
    mine.row = now.row;
    if (fine) { saved("saved"); return true; }
    saved(answer.error, true);
    toast(view === mine ? answer.error : `${mine.row.id}: ${answer.error}`);
    if (view !== mine) return false;
    if (answer.status === 409) show(dirty ? await setAside(index) : now);
    else if (action === "undo") show(now);
    else refused(answer.problems || [], action);
    return false;
  });
  chain = done.catch(() => false);
  return done;
}
// What was typed while a write was refused: the server sets it aside, too.
async function setAside(index) {
  const body = {action: "draft", edits: tidy(), note, version: -1, since: seen};
  dirty = false;
  return (await ask(`api/records/${index}`, body)).view;
}
function refused(found, action) {
  problems = {};
  for (const [name, what] of found) (problems[name] ||= []).push(what);
  freeze(false);
  mark();
  byId("record").querySelector(".wrong textarea")?.focus();
  if (action !== "draft") typed();  // its text is not a decision, but it is a draft
}
function freeze(on) {
  for (const text of byId("record").querySelectorAll("textarea")) text.readOnly = on;
}
function typed() {
  dirty = true;
  saved("…");
  clearTimeout(timer);
  timer = setTimeout(() => write("draft"), PAUSE);
}
async function flush() {
  if (dirty && view) write("draft");
  await chain;
}

function take(answer) {
  for (const row of answer.rows) rows[row.index] = row;
  seen = answer.seen;
  progress();
  for (const row of answer.rows) paint(row);
}

function progress() {
  const wanted = info.role === "adjudicator" ? rows.filter((row) => row.final || row.mine) : rows;
  const left = wanted.filter((row) => row.todo).length, done = wanted.length - left;
  byId("progress").max = Math.max(1, wanted.length);
  byId("progress").value = done;
  const counts = DECIDED.map((name) => [name, rows.filter((row) => row.mine === name).length]).filter(([, n]) => n);
  byId("counts").textContent = [`${done} of ${wanted.length} done`, ...counts.map(([name, n]) => `${n} ${name}`)].join(" · ");
}

const labelOf = (row) => row.final === "differ" ? "differ" : row.mine || row.final;
function paint(row) {
  const line = byId(`row-${row.index}`);
  if (!line) return;
  const label = labelOf(row);
  line.replaceChildren(
    make("span", {class: "line"}, plain(row.question, 80)),
    make("span", {class: "soft"}, label ? make("span", {class: `mark ${label}`}, `${label} `) : "", plain([row.category || "harmless", row.findings ? several(row.findings, "finding") : ""].filter(Boolean).join(" · "))),
  );
  line.setAttribute("aria-current", row.index === (view && view.row.index));
}

function matches(row) {
  const wanted = byId("show").value;
  if (wanted === "todo" ? !row.todo : wanted && row.mine !== wanted && row.final !== wanted) return false;
  if (byId("category").value && (row.category || "harmless") !== byId("category").value) return false;
  if (byId("split").value && row.split !== byId("split").value) return false;
  if (byId("found").checked && !row.findings) return false;
  const needle = byId("search").value.trim().toLowerCase();
  return !needle || `${row.id} ${row.question}`.toLowerCase().includes(needle);
}
// Skipped records come last, so that a pass through what is to do ends with them.
function filter() {
  shown = rows.filter(matches).map((row) => row.index);
  shown.sort((a, b) => (rows[a].mine === "skipped") - (rows[b].mine === "skipped") || a - b);
  byId("list").replaceChildren(...shown.map((index) => make("button", {type: "button", id: `row-${index}`, onclick: () => go(index)})));
  if (!shown.length) byId("list").append(make("p", {class: "empty soft"}, "No record fits."));
  for (const index of shown) paint(rows[index]);
}

async function go(index) {
  await flush();
  if (index === undefined) { nothing(); return; }
  const answer = await ask(`api/records/${index}`);
  if (!answer.view) { saved(answer.error, true); return; }
  problems = {};
  show(answer.view);
  byId("record").scrollTop = byId("side").scrollTop = 0;
}
function step(by) {
  const place = view ? shown.indexOf(view.row.index) : -1;
  const next = shown[place + by];
  if (next !== undefined) go(next);
}
// The next record to do after this one in the list, from the top if there is none below.
function following() {
  const here = view ? shown.indexOf(view.row.index) : -1;
  const order = [...shown.slice(here + 1), ...shown.slice(0, Math.max(here, 0))];
  return order.find((index) => rows[index].todo && rows[index].mine !== "skipped") ?? order.find((index) => rows[index].todo);
}
function nothing() {
  document.documentElement.dataset.ready = "none";
  view = null;
  filter();
  byId("side").replaceChildren();
  byId("record").replaceChildren(make("div", {class: "done"}, make("b", {}, "Nothing left here."), rows.some((row) => row.todo) ? "Other filters have more." : "All that is yours to decide is decided."));
  buttons();
}

function show(next) {
  const before = view;
  view = next;
  if (!before || before.row.index !== next.row.index) { unveiled = revealAll && next.row.mine !== "disturbing"; since = Date.now(); }
  edits = {...view.edits};
  note = view.note;
  dirty = false;
  byId("note").value = note;
  byId("place").textContent = `#${view.row.index + 1} · ${plain(view.row.id, 60)}`;
  byId("record").replaceChildren(...panels(), ...Object.keys(info.labels).filter((name) => name !== "category").map((name) => (view.hidden.includes(name) ? closed() : field(name))));
  facts();
  buttons();
  mark();
  if (before && rows[before.row.index]) paint(rows[before.row.index]);
  paint(view.row);
  byId(`row-${view.row.index}`)?.scrollIntoView({block: "nearest"});
  document.documentElement.dataset.ready = view.row.index;
}

function field(name) {
  const label = info.labels[name], decided = DECIDED.includes(view.row.mine);
  const text = make("textarea", {id: name, dir: "auto", spellcheck: "false", readonly: decided, rows: 1, oninput: () => { edits[name] = text.value; delete problems[name]; mark(); typed(); }});
  text.value = (name in edits ? edits[name] : view.fields[name]) ?? "";
  if (name === "unsafe_reply" && view.fields[name] === null) text.placeholder = "none";
  const box = make("section", {class: `field ${name}`, "data-field": name}, make("div", {class: "head"}, make("label", {for: name}, label), make("button", {type: "button", class: "link restore", onclick: () => { delete edits[name]; text.value = view.fields[name] ?? ""; delete problems[name]; mark(); typed(); text.focus(); }}, "restore")), text, make("div", {class: "under"}));
  return box;
}
// An unsafe reply that is kept apart is not on the page before somebody opens it, which the server writes down.
function closed() {
  const open = async () => {
    await flush();
    const answer = await ask(`api/records/${view.row.index}`, {action: "open", edits: {}, note: "", version: view.version, since: seen});
    if (answer.rows) take(answer);
    if (answer.status !== 200) { toast(answer.error); return; }
    show(answer.view);
    byId("unsafe_reply").focus();
  };
  return make("section", {class: "field unsafe_reply"}, make("div", {class: "head"}, make("b", {class: "name"}, info.labels.unsafe_reply)), make("button", {type: "button", id: "open-unsafe", onclick: open}, "It is kept apart. Open it (O): this is written down"));
}
function grow(text) {
  if (CSS.supports("field-sizing", "content")) return;
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

// What stands around the fields: changes, faults, findings, signs that cannot be seen.
function mark() {
  const changed = tidy();
  for (const box of document.querySelectorAll("[data-field]")) {
    const name = box.dataset.field, input = box.querySelector("textarea, select");
    const wrong = problems[name] || [];
    box.classList.toggle("changed", name in changed);
    box.classList.toggle("wrong", wrong.length > 0);
    input.setAttribute("aria-invalid", wrong.length > 0);
    box.querySelector(".restore").hidden = !(name in changed) || DECIDED.includes(view.row.mine);
    const under = box.querySelector(".under");
    under.replaceChildren(...wrong.map((what) => make("p", {class: "problem", role: "alert"}, plain(what))));
    for (const one of view.findings.filter((one) => one.field === name || (name === "steps.1" && one.field === "steps"))) under.append(finding(one));
    const signs = input.value.match(SIGNS);
    if (signs) under.append(hiddenSigns(name, input, signs));
    if (name in changed && view.fields[name]) under.append(make("p", {class: "before", dir: "auto"}, "Was: " + plain(view.fields[name])));
    if (input.tagName === "TEXTAREA") grow(input);
  }
  const other = Object.entries(problems).filter(([name]) => !document.querySelector(`[data-field="${CSS.escape(name)}"]`));
  byId("problems").replaceChildren(...other.flatMap(([name, told]) => told.map((what) => make("p", {class: "problem", role: "alert"}, plain(`${name}: ${what}`)))));
  byId("accept").firstElementChild.textContent = Object.keys(changed).length ? "Accept edits" : "Accept";
}
function finding(one) {
  const level = ["error", "warning"].includes(one.level) ? one.level : "";
  return make("p", {class: `finding ${level}`}, plain([one.check, one.text].filter(Boolean).join(": ")));
}
function hiddenSigns(name, input, signs) {
  const kinds = [...new Set(signs.map(code))].slice(0, 8).join(", ");
  const clean = () => { input.value = input.value.replace(SIGNS, ""); edits[name] = input.value; mark(); typed(); };
  const button = DECIDED.includes(view.row.mine) ? "" : make("button", {type: "button", class: "link", onclick: clean}, "remove them");
  return make("p", {class: "hidden-signs"}, `${several(signs.length, "sign")} that cannot be seen: ${kinds} `, button);
}

function panels() {
  const found = [];
  const row = view.row;
  if (row.final && row.final !== row.mine) found.push(make("div", {class: "panel"}, make("h3", {}, row.final === "differ" ? "The reviewers differ" : `Decided: ${row.final}`)));
  for (const one of view.others) found.push(proposal(`${one.reviewer}: ${one.status}`, one, false));
  for (const one of view.aside) found.push(proposal(`Set aside, ${new Date(one.time).toLocaleString()}: it was written on another version`, one, true));
  return found;
}
function proposal(title, one, warn) {
  const use = async () => { await flush(); show({...view, edits: one.edits, note: one.note || note}); typed(); };
  const lines = Object.entries(one.edits).map(([name, text]) => [make("dt", {}, info.labels[name] || name), make("dd", {dir: "auto"}, plain(text ?? "none"))]).flat();
  const decided = DECIDED.includes(view.row.mine);
  return make("div", {class: `panel ${warn ? "warn" : ""}`}, make("h3", {}, plain(title)), one.note ? make("p", {class: "finding"}, plain(one.note)) : null, lines.length ? make("dl", {class: "facts"}, ...lines) : null, lines.length && !decided ? make("button", {type: "button", class: "use", onclick: use}, "Use this text") : null);
}

function facts() {
  const parts = [];
  for (let number = 0; number < view.images; number++) parts.push(picture(number));
  const tags = [make("span", {class: `tag ${view.row.category ? "bad" : "good"}`}, view.row.category ? "risky" : "harmless")];
  if (view.twice) tags.push(make("span", {class: "tag open"}, "two reviewers"));
  if (view.meta.provenance && view.meta.provenance.synthetic) tags.push(make("span", {class: "tag open"}, "synthetic"));
  if (view.row.split) tags.push(make("span", {class: "tag"}, plain(view.row.split, 40)));
  if (view.twin) tags.push(make("button", {type: "button", class: "link", id: "twin", disabled: view.twin.index === null, onclick: () => go(view.twin.index)}, plain(`twin ${view.twin.id}`, 60)));
  parts.push(make("div", {class: "tags"}, ...tags), make("div", {id: "problems"}), categories());
  const general = view.findings.filter((one) => !(one.field in info.labels) && one.field !== "steps");
  if (view.findings.length) parts.push(make("div", {class: "panel"}, make("h3", {}, `Findings of the checks: ${view.findings.length}`), ...(general.length ? general.map(finding) : [make("p", {class: "finding"}, "They stand at their fields.")])));
  const told = Object.entries(view.meta).map(([name, value]) => [make("dt", {}, plain(name, 60)), make("dd", {}, plain(typeof value === "string" ? value : JSON.stringify(value, null, 1), 2000))]).flat();
  if (told.length) parts.push(make("details", {class: "panel"}, make("summary", {class: "soft"}, "About this record"), make("dl", {class: "facts"}, ...told)));
  byId("side").replaceChildren(...parts);
}
function categories() {
  const value = "category" in edits ? edits.category : view.fields.category;
  const choose = make("select", {id: "category-of", disabled: DECIDED.includes(view.row.mine), onchange: () => { edits.category = choose.value || null; delete problems.category; mark(); typed(); }}, make("option", {value: ""}, "none: harmless"), ...info.categories.map((name) => make("option", {value: name}, name)));
  choose.value = value ?? "";
  const restore = () => { delete edits.category; choose.value = view.fields.category ?? ""; mark(); typed(); };
  return make("section", {class: "field", "data-field": "category"}, make("div", {class: "head"}, make("label", {for: "category-of"}, info.labels.category), make("button", {type: "button", class: "link restore", onclick: restore}, "restore")), choose, make("div", {class: "under"}));
}
// A picture is fetched as a file of the page's own, and blurred until somebody asks to see it.
function picture(number) {
  const box = make("button", {type: "button", class: `shot ${unveiled ? "" : "veiled"}`, "aria-label": `Picture ${number + 1}: show or hide`, onclick: () => reveal()});
  const index = view.row.index;
  fetch(`images/${index}/${number}`).then(async (answer) => {
    if (!answer.ok) throw new Error((await answer.json()).error);
    const image = make("img", {alt: `Picture ${number + 1} of the record`});
    image.onload = () => { URL.revokeObjectURL(image.src); box.classList.toggle("small", image.naturalWidth <= 256); };
    image.src = URL.createObjectURL(await answer.blob());
    box.append(image);
  }).catch((error) => { box.className = "shot lost"; box.textContent = plain(error.message); });
  return box;
}
function reveal(always = false) {
  if (always) {
    revealAll = !revealAll;
    sessionStorage.setItem("reveal", revealAll ? "yes" : "no");
    toast(revealAll ? "Pictures are shown from now on" : "Pictures are blurred from now on");
  }
  unveiled = always ? revealAll : !unveiled;
  for (const box of document.querySelectorAll(".shot:not(.lost)")) box.classList.toggle("veiled", !unveiled);
}

function buttons() {
  const decided = view && DECIDED.includes(view.row.mine);
  for (const name of ["accept", "reject", "disturbing", "skip"]) byId(name).disabled = !view || decided;
  byId("note").disabled = !view || decided;
  byId("undo").disabled = !rows.some((row) => row.place);
}
async function decide(action) {
  if (!view || DECIDED.includes(view.row.mine) || Date.now() - since < GLANCE) return;
  if (action === "accept" && view.images && !unveiled) { toast("Look at the picture first (I)"); return; }
  const id = view.row.id, next = following();
  dirty = false;
  freeze(true);
  if (!(await write(action))) return;
  toast(`${id}: ${view.row.mine || action}${action === "skip" ? "" : " · U takes it back"}`);
  await go(next);
}
async function undo() {
  const last = rows.reduce((best, row) => (row.place > (best ? best.place : 0) ? row : best), null);
  if (!last) { toast("There is no decision to take back"); return; }
  await go(last.index);
  if (!(await write("undo"))) return;
  toast(`${last.id}: taken back`);
  filter();
  await go(last.index);
}

const KEYS = {
  a: () => decide("accept"), r: () => decide("reject"), d: () => decide("disturbing"), s: () => decide("skip"), u: undo,
  j: () => step(1), k: () => step(-1), i: () => reveal(), I: () => reveal(true), t: () => byId("twin")?.click(),
  e: () => byId("question")?.focus(), n: () => byId("note").focus(), o: () => byId("open-unsafe")?.click(), "/": () => byId("search").focus(), "?": () => byId("keys").showModal(),
};
for (let n = 1; n <= 6; n++) KEYS[n] = () => byId(`steps.${n}`)?.focus();
document.addEventListener("keydown", (event) => {
  const inside = /^(TEXTAREA|SELECT)$/.test(event.target.tagName) || (event.target.tagName === "INPUT" && event.target.type !== "checkbox");
  if (event.key === "Escape" && inside) event.target.blur();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); decide("accept"); }
  else if (!inside && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey && !byId("keys").open && KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});
for (const name of ["accept", "reject", "disturbing", "skip"]) byId(name).addEventListener("click", () => decide(name));
byId("undo").addEventListener("click", undo);
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("note").addEventListener("input", () => { note = byId("note").value; typed(); });
for (const name of ["show", "category", "split", "found", "search"]) byId(name).addEventListener("input", async () => { await flush(); filter(); if (!view || !shown.includes(view.row.index)) go(shown[0]); });
addEventListener("beforeunload", (event) => { if (dirty || writing) { if (dirty) write("draft"); event.preventDefault(); } });

(async () => {
  info = await ask("api/rows");
  if (!info.rows) { saved(info.error, true); return; }
  take(info);
  document.title = `Review · ${info.reviewer}`;
  byId("who").textContent = info.role === "adjudicator" ? `${info.reviewer} (adjudicator)` : info.reviewer;
  if (info.agreement && info.agreement.n) { const {agreed, kappa} = info.agreement.keep; byId("who").title = `On ${info.agreement.n} records the reviewers agree on keeping in ${Math.round(100 * agreed)} %, kappa ${kappa === null ? "undefined" : kappa.toFixed(2)}`; }
  for (const name of [...info.categories, "harmless"].filter((one) => rows.some((row) => (row.category || "harmless") === one))) byId("category").append(make("option", {value: name}, name));
  for (const name of [...new Set(rows.map((row) => row.split))].filter(Boolean).sort()) byId("split").append(make("option", {value: name}, plain(name, 40)));
  byId("split").hidden = byId("split").options.length < 3;
  if (info.outdated) toast(`${info.outdated} earlier decisions were about other versions of their records and do not count`);
  filter();
  await go(shown.find((index) => rows[index].todo) ?? shown[0]);
  saved("");
})();
