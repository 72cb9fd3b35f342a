// Reasoning trees: one trunk, branches below it, each a line of steps that ends in its answer.
const COMBS = INDEX.combs, LINE = 22, tree = {set: 0, at: 0, branch: -1, shown: []};
const STATES = {good: "✓", bad: "✗", open: "?", plain: ""};

// A step that nobody judged is plain; one that the judge could not tell is open.
const look = (value, judged) => (judged ? mood(value) : "plain");
function dot(x, y, state, size, text) {
  return svg("g", {class: `node ${state}`}, svg("circle", {cx: x, cy: y, r: size}),
    svg("text", {x, y: y + 3.5, "text-anchor": "middle"}, text === undefined ? STATES[state] : text));
}
function square(x, y, state, size) {
  return svg("g", {class: `node ${state}`}, svg("rect", {x: x - size, y: y - size, width: 2 * size, height: 2 * size, rx: 2}),
    svg("text", {x, y: y + 3.5, "text-anchor": "middle"}, STATES[state]));
}

function drawComb() {
  const found = COMBS[tree.set], one = block(`comb-${tree.set}-${tree.at}`), steps = one.steps.length;
  const width = Math.max(300, Math.min(660, byId("comb").clientWidth)), pitch = (width - 40) / (steps + 1);
  const order = one.branches.map((_, m) => m).sort((a, b) => one.branches[b].prefix - one.branches[a].prefix || a - b);
  const height = 46 + LINE * order.length, x = (column) => 20 + pitch * column;
  const stems = [], lines = order.map((m, place) => {
    const branch = one.branches[m], y = 52 + LINE * place;
    stems[branch.prefix] = y;  // each prefix's lowest line
    return branchLine(branch, m, x, y, steps, width, found);
  });
  const parts = [trunkLine(one, x, steps, width, found.stepJudge !== ""), ...lines];
  stems.forEach((y, prefix) => parts.push(svg("line", {class: "stem", x1: x(prefix), y1: 27, x2: x(prefix), y2: y})));
  const figure = svg("svg", {class: "comb", viewBox: `0 0 ${width} ${height}`, width, height, role: "listbox",
    "aria-label": `Reasoning tree: the reference path and ${order.length} branches`}, ...parts);
  tree.lines = [-1, ...order];
  byId("comb").replaceChildren(figure);
}
function line(m, name, hit, ...parts) {
  const chosen = m === tree.branch;
  const group = svg("g", {class: chosen ? "line chosen" : "line", role: "option", tabindex: chosen ? 0 : -1,
    "aria-selected": String(chosen), "aria-label": name, "data-branch": m}, svg("title", {}, name), hit, ...parts);
  group.addEventListener("click", () => choose(m, true));
  return group;
}
function trunkLine(one, x, steps, width, judged) {
  const nodes = [svg("line", {class: "trunk", x1: x(0), y1: 18, x2: x(steps + 1), y2: 18})];
  nodes.push(svg("rect", {class: "prompt", x: x(0) - 9, y: 9, width: 18, height: 18, rx: 4}));
  nodes.push(svg("text", {class: "sign", x: x(0), y: 21.5, "text-anchor": "middle"}, "Q"));
  one.steps.forEach((step, i) => nodes.push(dot(x(i + 1), 18, look(step.safe, judged), 9, String(i + 1))));
  nodes.push(svg("rect", {class: "prompt", x: x(steps + 1) - 9, y: 9, width: 18, height: 18, rx: 9}));
  nodes.push(svg("text", {class: "sign", x: x(steps + 1), y: 21.5, "text-anchor": "middle"}, "A"));
  return line(-1, "reference path and reply", svg("rect", {class: "hit", x: 0, y: 2, width, height: 32, rx: 6}), ...nodes);
}
function branchLine(branch, m, x, y, steps, width, found) {
  const last = branch.answer === null ? Math.min(branch.prefix + branch.steps.length, steps) : steps + 1;
  const parts = [svg("line", {class: `way ${mood(branch.good)}`, x1: x(branch.prefix), y1: y, x2: Math.max(x(last), x(branch.prefix) + 12), y2: y})];
  branch.steps.slice(0, steps - branch.prefix).forEach((step, i) => {
    parts.push((i < branch.given ? square : dot)(x(branch.prefix + 1 + i), y, look(step.safe, found.stepJudge !== ""), 7));
  });
  const state = mood(branch.good), lost = branch.answer === null;
  if (!lost) parts.push(dot(x(steps + 1), y, state, 9));
  else parts.push(svg("text", {class: "lost", x: Math.min(x(last) + 12, width - 62), y: y + 4}, visible(branch.status)));
  if (branch.count > 1) parts.push(svg("text", {class: "times", x: x(branch.prefix) + 4, y: y - 3}, `×${branch.count}`));
  const told = [`${branch.kind || "branch"} after step ${branch.prefix}`, lost ? `no answer (${branch.status})` : `${found.good}: ${yes(branch.good)}`];
  if (branch.count > 1) told.push(`${branch.count} alike`);
  return line(m, visible(told.join(", ")), svg("rect", {class: "hit", x: 0, y: y - LINE / 2, width, height: LINE, rx: 6}), ...parts);
}

function choose(m, focus) {
  tree.branch = m;
  drawComb();
  const one = block(`comb-${tree.set}-${tree.at}`), found = COMBS[tree.set];
  byId("comb-text").replaceChildren(...(m < 0 ? trunkText(one, found) : branchText(one, one.branches[m], found)));
  if (focus) byId("comb").querySelector(`[data-branch="${m}"]`).focus();
}
function trunkText(one, found) {
  const told = make("div", {class: "meta"}, "reference path and reply");
  const reply = make("div", {class: "answer"}, make("div", {class: "meta"}, "reference reply"), foreign(one.reply));
  return [told, ...one.steps.map((step) => stepBox(step, found.stepJudge !== "")), reply];
}
function branchText(one, branch, found) {
  const judged = found.stepJudge !== "", place = branch.prefix ? `after step ${branch.prefix} of the reference path` : "from the prompt";
  const head = make("div", {class: "meta"}, chip(found.good, branch.good), ` ${visible(branch.kind) || "branch"} ${place}`, branch.count > 1 ? `, ${branch.count} samples alike` : "");
  const shared = make("details", {class: "shared"}, make("summary", {}, `shared: reference steps 1 to ${branch.prefix}`), ...one.steps.slice(0, branch.prefix).map((step) => stepBox(step, judged)));
  const own = branch.steps.map((step, i) => {
    const box = stepBox(step, judged);
    if (i < branch.given) box.firstChild.append(make("span", {class: "tag"}, "put there"));
    return box;
  });
  return [head, ...(branch.prefix ? [shared] : []), ...own, branchAnswer(branch, found)];
}
function branchAnswer(branch, found) {
  const box = make("div", {class: "answer"});
  if (branch.answer === null) {
    box.append(make("div", {class: "meta"}, `no answer (${visible(branch.status)}); all that it wrote:`), foreign(branch.text));
    return box;
  }
  box.append(make("div", {class: "meta"}, "answer ", chip("safe", branch.safe), " ", chip("effective", branch.effective), " ", make("span", {class: "tag"}, `refuses: ${yes(branch.refused)}`)));
  box.append(foreign(branch.answer), make("div", {class: "why"}, foreign(`${found.judge}: ${branch.reason}`, 2000)));
  return box;
}

function showTree(at, focus) {
  const found = COMBS[tree.set], about = found.trees[at];
  tree.at = at;
  byId("comb-tree").value = String(at);
  const facts = [about.risky ? "risky" : "harmless", about.category, about.id].filter(Boolean).join(" · ");
  byId("comb-ask").replaceChildren(make("div", {class: "ask"}, make("div", {class: "shots"}, ...about.images.map((name) => shot(name))),
    make("div", {}, make("div", {class: "question"}, foreign(about.question)), make("div", {class: "meta"}, visible(facts)))));
  const some = found.trees.length < found.total ? `${found.trees.length} of ${found.total} trees are here.` : "";
  byId("comb-told").textContent = visible(`Lines and answers: ${found.meaning} (${found.judge}). Steps: ${found.stepJudge ? `safe (${found.stepJudge})` : "nobody judged them"}. ${found.given ? "Squares were put there, circles sampled. " : ""}${some}`);
  choose(-1, focus);
}
function listTrees() {
  const kind = byId("comb-kind").value, trees = COMBS[tree.set].trees;
  const fits = {"": () => true, mixed: (t) => t.mixed, risky: (t) => t.risky, harmless: (t) => !t.risky}[kind];
  tree.shown = trees.map((_, i) => i).filter((i) => fits(trees[i]));
  byId("comb-tree").replaceChildren(...tree.shown.map((i) => make("option", {value: i}, visible(trees[i].question))));
  if (tree.shown.length) showTree(tree.shown[0], false);
  else for (const id of ["comb", "comb-ask", "comb-text"]) byId(id).replaceChildren(id === "comb" ? "No tree of this kind." : "");
}
function turnTree(by, focus) {
  if (!tree.shown.length) return;
  const place = tree.shown.indexOf(tree.at) + by;
  showTree(tree.shown[(place + tree.shown.length) % tree.shown.length], focus);
}
function treeKey(event) {
  const moves = {ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1};
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") { turnTree(moves[event.key], true); return; }
  const place = tree.lines.indexOf(tree.branch) + moves[event.key];
  choose(tree.lines[Math.min(Math.max(place, 0), tree.lines.length - 1)], true);
}

if (COMBS.length) {
  options("comb-set", COMBS.map((found, i) => [i, found.title]));
  byId("comb-set").addEventListener("change", () => { tree.set = Number(byId("comb-set").value); listTrees(); });
  byId("comb-kind").addEventListener("change", listTrees);
  byId("comb-tree").addEventListener("change", () => showTree(Number(byId("comb-tree").value), false));
  byId("comb-back").addEventListener("click", () => turnTree(-1, false));
  byId("comb-next").addEventListener("click", () => turnTree(1, false));
  byId("comb").addEventListener("keydown", treeKey);
  addEventListener("resize", () => { if (tree.shown.length) drawComb(); });
  if (COMBS.length < 2) byId("comb-set").parentElement.hidden = true;
  tree.set = COMBS.length - 1;
  byId("comb-set").value = tree.set;
  listTrees();
}
document.documentElement.dataset.ready = String(Math.round(performance.now()));
