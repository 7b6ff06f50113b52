"use strict";
// Hovers, toggles and filters of the page. Text from the run reaches the page only through textContent.
const failures = [];
addEventListener("error", (event) => failures.push(String(event.message)));

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const SVG = document.querySelector("svg")?.namespaceURI;

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

function drawn(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  return node;
}

const islands = new WeakMap();
function dataOf(node) {
  const figure = node.closest("figure");
  if (!islands.has(figure)) islands.set(figure, JSON.parse(figure.querySelector('script[type="application/json"]').textContent));
  return islands.get(figure);
}

function shown(value, percent) {
  if (value === null || value === undefined) return "–";
  const text = percent ? (100 * value).toFixed(1) + "%" : Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 });
  return text.replace("-", "−");
}

// ---- tooltip ----
const tip = document.getElementById("tip");

function showTip(x, y, nodes) {
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
  const top = y + 14 + box.height > innerHeight - 8 ? y - 14 - box.height : y + 14;
  tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
}

const hideTip = () => (tip.hidden = true);
const tipHead = (text) => element("div", { className: "head", textContent: text });

function tipRow(label, value, colour, small) {
  const row = element("div", { className: "row" });
  if (colour) row.append(element("i", { className: "key", style: `background:${colour}` }));
  row.append(element("span", { textContent: label }));
  const figure = element("b", { textContent: value });
  if (small) figure.append(" ", element("small", { textContent: small }));
  row.append(figure);
  return row;
}

document.addEventListener("pointerover", (event) => {
  const target = event.target.closest?.("[data-tip]");
  if (target) showTip(event.clientX, event.clientY, [document.createTextNode(target.dataset.tip)]);
});
document.addEventListener("pointerout", (event) => event.target.closest?.("[data-tip]") && hideTip());
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// ---- a pointer or the arrow keys choose a column of a drawing ----
function follow(svg, columnAt, count, show, clear) {
  let column = -1;
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  svg.addEventListener("pointermove", (event) => {
    if (event.target.closest("[data-tip]")) return clear();
    const [x, y] = place(event);
    column = columnAt(x, y);
    if (column < 0) clear();
    else show(column, y, event.clientX, event.clientY);
  });
  const leave = () => { clear(); hideTip(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    column = column < 0 ? (move > 0 ? 0 : count - 1) : Math.min(count - 1, Math.max(0, column + move));
    const box = svg.getBoundingClientRect();
    show(column, null, box.left + box.width / 2, box.top + 30);
  });
}

// ---- line charts ----
function lineChart(svg) {
  const data = dataOf(svg);
  const [x0, x1, px0, px1, y0, y1, py0, py1, log] = svg.dataset.hover.split(" ").map(Number);
  const scaleX = (x) => px0 + ((x - x0) / (x1 - x0 || 1)) * (px1 - px0);
  const share = (y) => (log ? (Math.log(Math.max(y, 1e-300)) - Math.log(y0)) / (Math.log(y1) - Math.log(y0)) : (y - y0) / (y1 - y0 || 1));
  const cross = drawn("g", { "pointer-events": "none" });
  svg.append(cross);
  const nearest = (x) => {
    if (x < px0 - 12 || x > px1 + 12 || !data.x.length) return -1;
    let best = 0;
    data.x.forEach((value, i) => { if (Math.abs(scaleX(value) - x) < Math.abs(scaleX(data.x[best]) - x)) best = i; });
    return best;
  };
  const clear = () => { if (cross.childNodes.length) { cross.replaceChildren(); hideTip(); } };
  follow(svg, nearest, data.x.length, (i, _, clientX, clientY) => {
    const x = scaleX(data.x[i]);
    const there = data.series.filter((s) => s.values[i] !== null);
    cross.replaceChildren(drawn("line", { x1: x, x2: x, y1: py1, y2: py0, class: "cross" }));
    for (const s of there) {
      const dot = drawn("circle", { cx: x, cy: py0 + share(s.values[i]) * (py1 - py0), r: 4, class: "cross-dot" });
      dot.style.fill = s.colour;
      cross.append(dot);
    }
    const rows = there.sort((a, b) => b.values[i] - a.values[i]).map((s) => {
      const spread = s.low && s.low[i] !== null ? `${shown(s.low[i], data.percent)} to ${shown(s.high[i], data.percent)}` : "";
      return tipRow(s.label, shown(s.values[i], data.percent), s.colour, spread);
    });
    showTip(clientX, clientY, [tipHead(`${data.xName} ${shown(data.x[i])}`), ...rows]);
  }, clear);
}

// The name at the end of a line singles it out.
function singleOut(svg) {
  for (const label of all(".end", svg)) {
    const mine = all("[data-arm]", svg).filter((node) => node.dataset.arm === label.dataset.arm);
    label.addEventListener("pointerenter", () => { svg.classList.add("single"); mine.forEach((node) => node.classList.add("on")); });
    label.addEventListener("pointerleave", () => { svg.classList.remove("single"); mine.forEach((node) => node.classList.remove("on")); });
  }
}

// ---- schedules ----
function scheduleChart(svg) {
  const data = dataOf(svg);
  const [left, column, top, row] = svg.dataset.heat.split(" ").map(Number);
  const cross = drawn("g", { "pointer-events": "none" });
  svg.append(cross);
  const count = data.from.length;
  const columnAt = (x) => { const i = Math.floor((x - left) / column); return i >= 0 && i < count ? i : -1; };
  const clear = () => { if (cross.childNodes.length) { cross.replaceChildren(); hideTip(); } };
  follow(svg, columnAt, count, (i, y, clientX, clientY) => {
    const steps = data.from[i] === data.to[i] ? `step ${data.from[i]}` : `steps ${data.from[i]} to ${data.to[i]}`;
    const q = (name) => shown(data.quantiles[name]?.[i] ?? null);
    const rows = [tipHead(steps)];
    if (data.quantiles["50"]) rows.push(tipRow("median difficulty", q("50")));
    if (data.quantiles["25"] && data.quantiles["75"]) rows.push(tipRow("middle half", `${q("25")} to ${q("75")}`));
    const x = left + (i + 0.5) * column;
    const bottom = top + row * data.clusters.length;
    cross.replaceChildren(drawn("line", { x1: x, x2: x, y1: 8, y2: top - 4, class: "cross" }));
    const j = row && y !== null ? Math.floor((y - top) / row) : -1;
    if (j >= 0 && j < data.clusters.length && y < bottom) {
      cross.append(drawn("rect", { x: x - column / 2, y: top + j * row, width: column, height: row, class: "cell-focus" }));
      rows.push(tipRow(`cluster ${data.clusters[j]}`, `${data.shares[i][j]}%`));
    }
    showTip(clientX, clientY, rows);
  }, clear);
}

// ---- the map ----
function cssColour(name) {
  const probe = element("span", { style: `color:var(${name})` });
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return parts.slice(0, 3);
}
const rgb = (parts, alpha = 1) => `rgba(${parts.map(Math.round).join(",")},${alpha})`;

function promptMap(figure) {
  const data = dataOf(figure.firstElementChild);
  const canvas = figure.querySelector("canvas");
  const legend = figure.querySelector(".map-legend");
  const context = canvas.getContext("2d");
  const count = data.x.length;
  let field = data.fields[0], only = null, preview = null, at = -1, px = [], py = [], sizedTo = "", places = null, radius = 3;

  const limitsOf = (f) => {
    const sorted = f.values.filter((v) => v !== null).sort((a, b) => a - b);
    const cut = Math.floor(sorted.length / 50);
    return sorted.length ? [sorted[cut], sorted[sorted.length - 1 - cut]] : [0, 1];
  };
  for (const f of data.fields) if (f.kind === "number") f.limits = limitsOf(f);

  function colours() {
    if (field.kind === "category") return Array.from({ length: 12 }, (_, i) => cssColour(`--k${i}`));
    return [0, 1, 2, 3, 4].map((i) => cssColour(`--r${i}`));
  }
  function ramp(stops, value) {
    const [low, high] = field.limits;
    const t = Math.max(0, Math.min(0.9999, (value - low) / (high - low || 1))) * (stops.length - 1);
    const i = Math.floor(t);
    return stops[i].map((c, k) => c + (stops[i + 1][k] - c) * (t - i));
  }

  function draw() {
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    const ratio = devicePixelRatio || 1;
    canvas.width = box.width * ratio;
    canvas.height = box.height * ratio;
    context.scale(ratio, ratio);
    const pad = 16;
    if (sizedTo !== `${box.width} ${box.height}`) {
      sizedTo = `${box.width} ${box.height}`;
      px = data.x.map((v) => pad + (v / 10000) * (box.width - 2 * pad));
      py = data.y.map((v) => box.height - pad - (v / 10000) * (box.height - 2 * pad));
      radius = Math.max(1.6, Math.min(4.5, 0.21 * Math.sqrt((box.width * box.height) / count)));
      places = null;
    }
    const palette = colours(), grey = cssColour("--axis");
    const chosen = preview ?? only;
    const rank = (i) => (field.values[i] === null ? 0 : chosen !== null && field.values[i] !== chosen ? 1 : 2);
    const order = Array.from({ length: count }, (_, i) => i).sort((a, b) => rank(a) - rank(b));
    for (const i of order) {
      const value = field.values[i], r = rank(i);
      const colour = r < 2 ? grey : field.kind === "category" ? palette[value % 12] : ramp(palette, value);
      context.fillStyle = rgb(colour, r === 0 ? 0.5 : r === 1 ? 0.16 : 0.78);
      context.beginPath();
      context.arc(px[i], py[i], radius, 0, 7);
      context.fill();
    }
    if (field.kind === "category") names(chosen);
    if (at >= 0) {
      context.lineWidth = 2;
      context.strokeStyle = rgb(cssColour("--ink"));
      context.beginPath();
      context.arc(px[at], py[at], radius + 3, 0, 7);
      context.stroke();
    }
  }

  const middle = (list) => list.sort((a, b) => a - b)[list.length >> 1];
  const scatter = (list, centre) => middle(list.map((v) => Math.abs(v - centre)));

  // Names stand on the map where a category keeps together; where it is spread all over, only the legend has it.
  function placeNames() {
    const whole = scatter([...px], middle([...px])) + scatter([...py], middle([...py]));
    const members = field.categories.map(() => []);
    field.values.forEach((c, i) => c !== null && members[c].push(i));
    const taken = [];
    members.forEach((mine, c) => {
      if (mine.length < 3) return;
      const x = middle(mine.map((i) => px[i]));
      let y = middle(mine.map((i) => py[i]));
      if (scatter(mine.map((i) => px[i]), x) + scatter(mine.map((i) => py[i]), y) > 0.62 * whole) return;
      const half = context.measureText(field.categories[c]).width / 2 + 3;
      while (taken.some((t) => Math.abs(t.x - x) < t.half + half && Math.abs(t.y - y) < 15)) y += 4;
      taken.push({ c, x, y, half });
    });
    return taken;
  }
  function names(chosen) {
    context.font = "600 12px " + getComputedStyle(document.body).fontFamily;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 4;
    context.strokeStyle = rgb(cssColour("--page"), 0.9);
    context.fillStyle = rgb(cssColour("--ink"));
    places ??= placeNames();
    for (const { c, x, y } of places) {
      if (chosen !== null && chosen !== c) continue;
      context.strokeText(field.categories[c], x, y);
      context.fillText(field.categories[c], x, y);
    }
  }

  function drawLegend() {
    legend.replaceChildren();
    if (field.kind === "number") {
      const [low, high] = field.limits;
      legend.append(element("div", { className: "ramp-box" },
        element("div", { className: "ramp" }),
        element("div", { className: "ramp-ends" },
          element("span", { textContent: shown(Number(low.toPrecision(2)), field.percent) }),
          element("span", { textContent: field.label }),
          element("span", { textContent: shown(Number(high.toPrecision(2)), field.percent) }))));
      return;
    }
    field.categories.forEach((name, c) => {
      const total = field.values.filter((v) => v === c).length;
      const button = element("button", { type: "button", ariaPressed: String(only === c) },
        element("i", { className: "key", style: `background:var(--k${c % 12})` }),
        element("span", { textContent: name }),
        element("span", { textContent: total.toLocaleString("en-US") }));
      button.addEventListener("click", () => {
        only = only === c ? null : c;
        preview = null;
        all("button", legend).forEach((b, i) => (b.ariaPressed = String(only === i)));
        draw();
      });
      button.addEventListener("pointerenter", () => { preview = c; draw(); });
      button.addEventListener("pointerleave", () => { preview = null; draw(); });
      legend.append(button);
    });
  }

  function tell(clientX, clientY) {
    const rows = data.fields.map((f) => {
      const value = f.values[at];
      return tipRow(f.label, f.kind === "category" ? (value === null ? "unknown" : f.categories[value]) : shown(value, f.percent));
    });
    showTip(clientX, clientY, [element("div", { className: "quote", textContent: data.prompts[at] }), ...rows]);
  }
  function choose(i, clientX, clientY) {
    if (i !== at) { at = i; draw(); }
    if (i < 0) hideTip();
    else tell(clientX, clientY);
  }
  function closest(x, y, fits) {
    let best = -1, least = Infinity;
    for (let i = 0; i < count; i++) {
      const distance = (px[i] - x) ** 2 + (py[i] - y) ** 2;
      if (distance < least && fits(i, distance)) { best = i; least = distance; }
    }
    return best;
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const fits = (i, distance) => distance < 196 && (only === null || field.values[i] === only);
    choose(closest(event.clientX - box.left, event.clientY - box.top, fits), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => choose(-1));
  canvas.addEventListener("blur", () => choose(-1));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    const from = at < 0 ? [box.width / 2, box.height / 2] : [px[at], py[at]];
    const ahead = (i) => {
      const along = (px[i] - from[0]) * move[0] + (py[i] - from[1]) * move[1];
      const aside = Math.abs((px[i] - from[0]) * move[1]) + Math.abs((py[i] - from[1]) * move[0]);
      return i !== at && along > 0.5 && aside <= along && (only === null || field.values[i] === only);
    };
    const next = closest(from[0], from[1], at < 0 ? () => true : ahead);
    if (next >= 0) choose(next, box.left + px[next], box.top + py[next]);
  });
  for (const button of all("[data-field]", figure)) {
    button.addEventListener("click", () => {
      all("[data-field]", figure).forEach((other) => (other.ariaPressed = String(other === button)));
      field = data.fields[Number(button.dataset.field)];
      only = preview = places = null;
      drawLegend();
      draw();
    });
  }
  drawLegend();
  new ResizeObserver(draw).observe(canvas);
  repaints.push(draw);
  figure.dataset.points = String(count);
}

// ---- rollouts ----
function rolloutFilters(block) {
  const cards = all(".rollout", block), page = Number(block.querySelector(".rollouts").dataset.page);
  const more = block.querySelector(".more"), none = block.querySelector(".none-fit");
  let limit = page;
  const pressed = (group) => all(`[data-filter="${group}"][aria-pressed="true"]`, block).map((b) => b.dataset.value);
  function apply() {
    const hasArms = block.querySelector('[data-filter="arms"]') !== null;
    const arms = pressed("arms"), [wanted] = pressed("verdict");
    let fitting = 0;
    for (const card of cards) {
      const visible = all("li", card).filter((li) => {
        li.hidden = hasArms && li.dataset.arm !== undefined && !arms.includes(li.dataset.arm);
        return !li.hidden;
      });
      const fits = visible.length > 0 && (!wanted || (wanted === "changed" ? card.dataset.changed === "1" : visible.some((li) => li.dataset.status === wanted)));
      fitting += fits;
      card.hidden = !fits || fitting > limit;
    }
    none.hidden = fitting > 0;
    more.hidden = fitting <= limit;
    more.textContent = `Show more (${fitting - limit} left)`;
  }
  for (const button of all("[data-filter]", block)) {
    button.addEventListener("click", () => {
      const on = button.ariaPressed !== "true";
      if (button.dataset.filter === "verdict") all('[data-filter="verdict"]', block).forEach((b) => (b.ariaPressed = "false"));
      button.ariaPressed = String(on);
      limit = page;
      apply();
    });
  }
  more.addEventListener("click", () => { limit += 3 * page; apply(); });
  apply();
}

// ---- config filter, theme, sections ----
function configFilter(input) {
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of all("tr", input.parentElement)) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

const repaints = [];
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const repaint of repaints) repaint();
}
function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const fromHash = () => {
    const asked = { "#dark": "dark", "#light": "light" }[location.hash];
    if (asked) setTheme(asked);
  };
  fromHash();
  addEventListener("hashchange", fromHash);
  system.addEventListener("change", () => repaints.forEach((repaint) => repaint()));
  document.getElementById("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
    setTheme(now === "dark" ? "light" : "dark");
  });
}

function markSections() {
  const links = new Map(all(".bar a").map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) {
        if (id === entry.target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  all("main > section").forEach((section) => watcher.observe(section));
}

startTheme();
all("svg[data-hover]").forEach(lineChart);
all("svg[data-hover]").forEach(singleOut);
all("svg[data-heat]").forEach(scheduleChart);
all("figure.map").forEach(promptMap);
all(".rollout-block").forEach(rolloutFilters);
all("input.filter").forEach(configFilter);
markSections();

// The page reports on itself: what a test (or a doubtful reader, in the console) looks at.
window.reportCheck = () => ({
  charts: all("[data-chart]").map((node) => node.dataset.chart),
  empty: all("[data-chart]").filter((node) => !node.getBoundingClientRect().height && !node.closest("details:not([open]), [hidden]")).length,
  failures,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
document.documentElement.dataset.ready = failures.length ? "failed" : "yes";
