"use strict";
// The list of features, and the one that is open. Text reaches the page only through textContent.
const failures = [];
addEventListener("error", (event) => failures.push(String(event.message)));

const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

function drawn(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  return node;
}

const minus = (text) => text.replace("-", "−");
const shown = (value) => minus(Number(value.toPrecision(3)).toLocaleString("en-US", { maximumSignificantDigits: 3 }));
function percent(share) {
  if (share === 0) return "0%";
  return share < 0.0001 ? (100 * share).toExponential(0).replace("e-", "e−") + "%" : Number((100 * share).toPrecision(2)) + "%";
}

// ---- the data ----
const index = JSON.parse(byId("index").textContent);
const vocabulary = index.vocabulary;
const features = index.list.map(([id, label, words, density, max, score], place) => ({ id, label, words, density, max, score, place }));
const placeOf = new Map(features.map((feature) => [feature.id, feature.place]));
let lines = null; // one JSON text for each feature, read when it is asked for

function unpacked(text, kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new kind(bytes.buffer);
}

function detailsOf(feature) {
  lines ??= byId("details").textContent.split("\n");
  const details = JSON.parse(lines[feature.place]);
  const tokens = unpacked(details.tokens, index.wide ? Uint32Array : Uint16Array);
  const fires = unpacked(details.fires, Uint8Array);
  let start = 0;
  details.contexts = details.contexts.map(([kind, text, first, length, peak]) => {
    const context = { kind, text, first, peak, tokens: tokens.subarray(start, start + length), fires: fires.subarray(start, start + length) };
    start += length;
    return context;
  });
  return details;
}

// ---- search and order ----
let contextTexts = null; // of each feature, in small letters: made at the first search
function textsOf(feature) {
  contextTexts ??= features.map((each) => detailsOf(each).contexts.map((c) => Array.from(c.tokens, (t) => vocabulary[t]).join("")).join("\n").toLowerCase());
  return contextTexts[feature.place];
}

const ORDERS = {
  id: (a, b) => a.id - b.id,
  density: (a, b) => b.density - a.density,
  rare: (a, b) => a.density - b.density,
  max: (a, b) => b.max - a.max,
  score: (a, b) => (b.score ?? -1) - (a.score ?? -1),
};
let listed = [];
let chosen = null;

function matches(feature, wanted) {
  if (!wanted) return true;
  if (String(feature.id) === wanted || (/^\d+$/.test(wanted) && String(feature.id).startsWith(wanted))) return true;
  if (feature.label?.toLowerCase().includes(wanted)) return true;
  return textsOf(feature).includes(wanted);
}

function refresh() {
  const wanted = byId("search").value.toLowerCase();
  const trimmed = wanted.trim();
  const order = ORDERS[byId("sort").value];
  listed = features.filter((feature) => matches(feature, /^\d+$/.test(trimmed) ? trimmed : trimmed && wanted)).sort((a, b) => order(a, b) || a.id - b.id);
  if (/^\d+$/.test(trimmed)) listed.sort((a, b) => (String(b.id) === trimmed) - (String(a.id) === trimmed));
  byId("found").textContent = !trimmed ? "" : listed.length ? `${listed.length.toLocaleString("en-US")} found` : "Nothing found.";
  byId("spacer").style.height = listed.length * ROW + "px";
  byId("list").scrollTop = 0;
  paint();
}

// ---- the list: only what is in view is in the document ----
const ROW = 46;
const list = byId("list");

function item(feature, at) {
  const node = element("div", { className: "item", id: "f" + feature.id });
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", String(feature === chosen));
  node.setAttribute("aria-posinset", at + 1);
  node.setAttribute("aria-setsize", listed.length);
  node.style.top = at * ROW + "px";
  const name = feature.label ? element("span", { textContent: feature.label, title: feature.label }) : element("span", { className: "words", textContent: feature.words.join(" · ") });
  const figures = element("small", {}, percent(feature.density), element("br"), "max " + shown(feature.max));
  node.append(element("b", { textContent: feature.id }), name, figures);
  node.addEventListener("click", () => open(feature));
  return node;
}

function paint() {
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const to = Math.min(listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  byId("spacer").replaceChildren(...listed.slice(from, to).map((feature, i) => item(feature, from + i)));
  if (chosen && document.getElementById("f" + chosen.id)) list.setAttribute("aria-activedescendant", "f" + chosen.id);
  else list.removeAttribute("aria-activedescendant");
}
list.addEventListener("scroll", paint, { passive: true });
addEventListener("resize", paint);

function reveal(at) {
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
}

function step(by) {
  if (!listed.length) return;
  const now = listed.indexOf(chosen);
  const at = now < 0 ? 0 : Math.min(listed.length - 1, Math.max(0, now + by));
  open(listed[at]);
}

// ---- the feature that is open ----
function pairs(items) {
  return element("ul", { className: "pairs-list" }, ...items);
}

function tokenPairs(title, side) {
  const rows = side.map(([token, value]) => element("li", {}, element("code", { textContent: visible(vocabulary[token]) }), element("span", { textContent: minus(value.toFixed(2)) })));
  return element("div", {}, element("h4", { textContent: title }), pairs(rows));
}

function otherFeature(id, text) {
  const at = placeOf.get(id);
  const row = element("li");
  if (at === undefined) row.append(element("i", { textContent: id }));
  else {
    const other = features[at];
    const button = element("button", { type: "button", textContent: [id, other.label ?? other.words.join(" · ")].join("  ") });
    button.addEventListener("click", () => open(other));
    row.append(button);
  }
  row.append(element("span", { textContent: text }));
  return row;
}

const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥"));

function histogram({ width, counts }) {
  const svg = drawn("svg", { viewBox: "0 0 260 96", role: "img", "aria-label": "Histogram of activations" });
  const most = Math.log1p(Math.max(...counts, 1));
  const step = 258 / Math.max(counts.length, 1);
  counts.forEach((count, i) => {
    if (!count) return;
    const height = Math.max(1.5, (72 * Math.log1p(count)) / most);
    const bar = drawn("rect", { x: 1 + i * step, y: 76 - height, width: Math.max(step - 1, 0.6), height });
    bar.dataset.tip = `${shown(i * width)} to ${shown((i + 1) * width)}: ${count.toLocaleString("en-US")} tokens`;
    svg.append(bar);
  });
  svg.append(drawn("line", { class: "axis", x1: 0, x2: 260, y1: 76.5, y2: 76.5 }));
  for (const [x, anchor, value] of [[1, "start", 0], [259, "end", counts.length * width]]) {
    const text = drawn("text", { x, y: 92, "text-anchor": anchor });
    text.textContent = shown(value);
    svg.append(text);
  }
  return svg;
}

function contextRow(context, max) {
  const line = element("div", { className: "context" });
  let plain = "";
  const flush = () => { if (plain) line.append(plain); plain = ""; };
  context.tokens.forEach((token, i) => {
    const text = vocabulary[token].replaceAll("\n", "↵\n") || "∅";
    if (!context.fires[i]) { plain += text; return; }
    flush();
    const mark = element("mark", { textContent: text, className: i === context.peak ? "peak" : "" });
    mark.style.setProperty("--a", (context.fires[i] / 255).toFixed(3));
    mark.dataset.tip = `${visible(vocabulary[token])}  ${shown((context.fires[i] / 255) * max)}`;
    line.append(mark);
  });
  flush();
  const strength = element("b", { textContent: shown((context.fires[context.peak] / 255) * max), title: `text ${context.text}, from token ${context.first}` });
  return element("li", {}, strength, line);
}

function box(title, note, ...nodes) {
  const head = element("h3", { textContent: title });
  if (note) head.append(element("small", { textContent: note }));
  const node = element("div", {}, head, ...nodes);
  node.dataset.chart = title;
  return node;
}

function open(feature, { first = false } = {}) {
  chosen = feature;
  const details = detailsOf(feature);
  const parts = [element("h2", { textContent: `Feature ${feature.id}` })];
  if (feature.label) parts.push(element("p", { className: "label", textContent: feature.label }));
  const pills = [`fires at ${percent(feature.density)} of tokens (${details.count.toLocaleString("en-US")})`, `largest ${shown(feature.max)}`, `mean ${shown(details.mean)}`];
  if (feature.score !== null && feature.score !== undefined) pills.push(`label detects ${Math.round(100 * feature.score)}% (balanced, of ${details.judged} contexts)`);
  parts.push(element("div", { className: "pills" }, ...pills.map((text) => element("span", { className: "pill", textContent: text }))));
  const boxes = element("div", { className: "boxes" });
  boxes.append(box("Activations", "tokens, log scale", histogram(details.histogram)));
  if (details.raised) boxes.append(box("Logits", "of the decoder row", element("div", { className: "two" }, tokenPairs("raised", details.raised), tokenPairs("lowered", details.lowered))));
  if (details.near.length) boxes.append(box("Nearest decoder rows", "cosine", pairs(details.near.map(([id, cosine]) => otherFeature(id, minus(cosine.toFixed(2)))))));
  if (details.together.length) boxes.append(box("Fires together with", "Jaccard, φ", pairs(details.together.map(([id, jaccard, phi]) => otherFeature(id, `${jaccard.toFixed(2)}, ${minus(phi.toFixed(2))}`)))));
  parts.push(boxes);
  for (const [kind, title, note] of [["top", "Strongest contexts", ""], ["sampled", "Over the whole range", "evenly spread over the quantiles of a random sample"]]) {
    const rows = details.contexts.filter((context) => context.kind === kind).map((context) => contextRow(context, feature.max));
    if (!rows.length) continue;
    const block = box(title, note, element("ol", {}, ...rows));
    block.className = "shown";
    parts.push(block);
  }
  byId("open").replaceChildren(...parts);
  document.querySelector("main").scrollTop = 0;
  if (!first) history.replaceState(null, "", "#" + feature.id);
  const at = listed.indexOf(feature);
  if (at >= 0) reveal(at);
  paint();
}

// ---- keys, tips, theme ----
addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape") { byId("tip").hidden = true; if (event.target === byId("search")) { event.target.value = ""; refresh(); } }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !typing) { event.preventDefault(); byId("search").focus(); return; }
  const inSearch = event.target === byId("search");
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (inSearch && event.key === "Enter" && listed.length) { open(listed[0]); list.focus(); return; }
  const onList = event.target === list || event.target === document.body || event.target === byId("open");
  if (event.key in moves && (onList || (inSearch && event.key.startsWith("Arrow")))) { event.preventDefault(); step(moves[event.key]); }
  else if (!typing && (event.key === "j" || event.key === "k")) step(event.key === "j" ? 1 : -1);
});

const tip = byId("tip");
document.addEventListener("pointerover", (event) => {
  const target = event.target.closest?.("[data-tip]");
  if (!target) return;
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const size = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - size.width - 8);
  const top = event.clientY + 18 + size.height > innerHeight ? event.clientY - 12 - size.height : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
});
document.addEventListener("pointerout", (event) => event.target.closest?.("[data-tip]") && (tip.hidden = true));

const system = matchMedia("(prefers-color-scheme: dark)");
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});

let waiting = 0;
byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
byId("sort").addEventListener("change", refresh);
addEventListener("hashchange", () => { const at = placeOf.get(Number(location.hash.slice(1))); if (at !== undefined && features[at] !== chosen) open(features[at]); });

refresh();
open(features[placeOf.get(Number(location.hash.slice(1))) ?? 0], { first: true });

// The page reports on itself: what a test (or a doubtful reader, in the console) looks at.
window.reportCheck = () => ({
  charts: all("[data-chart]").map((node) => node.dataset.chart),
  empty: all("[data-chart]").filter((node) => !node.getBoundingClientRect().height).length,
  failures,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
document.documentElement.dataset.ready = failures.length ? "failed" : "yes";
document.documentElement.dataset.opened = Math.round(performance.now()); // milliseconds from the request to here
