// What all parts of the page share: the data, what is chosen, making elements, scales, redrawing, the tooltip.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows.map((values) => Object.fromEntries(DATA.columns.map((name, k) => [name, values[k]])));
const MODELS = new Map(DATA.models.map((model) => [model.id, model]));
const SEGMENTS = new Map(DATA.segments.map((segment) => [segment.id, segment]));
const TIERS = ["tier1", "tier2", "tier3", "tier4", "tier5"];
const state = { type: "all", segment: DATA.segment, sameScale: true };

const byId = (id) => document.getElementById(id);
const roleOf = (id) => (id === DATA.rival ? "rival" : MODELS.get(id)?.role ?? "baseline");
const nameOf = (id) => MODELS.get(id)?.name ?? id;
const typeName = (id) => (id === "all" ? "all types" : id);
const select = (fixed) => ROWS.filter((row) => Object.entries(fixed).every(([name, value]) => row[name] === value));

const rate = (value) => value.toFixed(4);
const percent = (value) => `${(100 * value).toFixed(1)}%`;
const count = (value) => value.toLocaleString("en-US");
const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(4)}`;
const day = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);

// Text goes in as text nodes and attributes only: a title is never read as markup.
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const pen = document.createElement("canvas").getContext("2d");

function textWidth(text, weight = 400) {
  pen.font = `${weight} 12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

// The text, cut to a width, whatever its weight will be.
function cut(text, width) {
  if (textWidth(text, 640) <= width) return text;
  let kept = text;
  while (kept.length > 1 && textWidth(`${kept}\u2026`, 640) > width) kept = kept.slice(0, -1);
  return `${kept.trimEnd()}\u2026`;
}

// Round numbers that span low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const span = Math.max(high - low, 1e-9);
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => span / (m * power) <= wanted) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step + 0); // + 0: no -0
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (Math.abs(step / power - 2.5) < 1e-9 ? 1 : 0));
  return { found, label: (value) => value.toFixed(digits).replace(/^-/, "\u2212") };
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

// Charts: drawn for the width that they have, and again when it or what is chosen changes.
const charts = [];

function chart(id, draw) {
  const node = typeof id === "string" ? byId(id) : id;
  if (!node) return;
  const entry = { node, width: 0, paint: () => entry.width > 0 && draw(node, entry.width) };
  charts.push(entry);
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width > 0 && width !== entry.width) {
      entry.width = width;
      entry.paint();
    }
  }).observe(node);
}

function redraw() {
  for (const entry of charts) entry.paint();
}

function drawing(node, width, height, ...children) {
  const title = `${node.dataset.title ?? ""}. Arrow keys read the values.`;
  const size = { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "group", "aria-label": title };
  node.replaceChildren(svg("svg", size, ...children));
}

const text = (x, y, content, attributes = {}) => svg("text", { x, y, ...attributes }, content);
const line = (x1, y1, x2, y2, name) => svg("line", { x1, y1, x2, y2, class: name });

// The tooltip: for the pointer over anything with data-tip, and for the arrow keys inside a chart.
const tip = byId("tip");

function showTip(content, x, y) {
  if (tip.textContent !== content) tip.textContent = content;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  const top = y + 16 + height > innerHeight ? y - 12 - height : y + 16;
  tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
}

function hideTip() {
  tip.hidden = true;
  for (const node of document.querySelectorAll("[data-current]")) node.removeAttribute("data-current");
}

function followPointer(event) {
  const target = event.target.closest?.("[data-tip]");
  if (target) showTip(target.dataset.tip, event.clientX, event.clientY);
  else if (!event.target.closest?.("canvas")) hideTip();
}

function stepThrough(event) {
  const chartNode = event.target.closest?.(".chart svg, #models");
  const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") hideTip();
  if (!chartNode || !move || event.target !== chartNode) return;
  event.preventDefault();
  const marks = [...chartNode.querySelectorAll("[data-tip]")];
  if (!marks.length) return;
  const now = marks.findIndex((mark) => mark.hasAttribute("data-current"));
  const next = marks[(now + move + marks.length) % marks.length] ?? marks[0];
  hideTip();
  next.setAttribute("data-current", "");
  const box = next.getBoundingClientRect();
  showTip(next.dataset.tip, box.left + box.width / 2, box.top + box.height / 2);
}

document.addEventListener("pointermove", followPointer);
document.addEventListener("pointerdown", followPointer);
document.addEventListener("keydown", stepThrough);
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, { passive: true });
