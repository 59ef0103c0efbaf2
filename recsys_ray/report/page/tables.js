// The table of models: figures of what is chosen, intervals drawn beside them, sorting. And the table of all figures.

// Models of a choice of rows, best first; whoever is not in it comes last.
function ranking(type, segment) {
  const value = new Map(select({ item_type: type, segment }).map((row) => [row.model, row.hr_at_10]));
  return [...MODELS.keys()].sort((a, b) => (value.get(b) ?? -1) - (value.get(a) ?? -1));
}

function describe(row) {
  const seeds = row.per_seed?.length ? `\nsingle seeds: ${row.per_seed.map(rate).join(", ")}` : "";
  return (
    `${nameOf(row.model)}: ${typeName(row.item_type)}, ${SEGMENTS.get(row.segment)?.name ?? row.segment}\n` +
    `HR@10 ${rate(row.hr_at_10)} (${rate(row.hr_at_10_low)} to ${rate(row.hr_at_10_high)})${seeds}\n` +
    `${count(row.users)} users, ${count(row.queries)} lists`
  );
}

const SHOWN = [
  (row) => rate(row.hr_at_10),
  (row) => `${rate(row.hr_at_10_low)} to ${rate(row.hr_at_10_high)}`,
  (row) => rate(row.ndcg_at_10),
  (row) => rate(row.mrr_at_100),
  (row) => rate(row.mrr_at_100_hits),
  (row) => percent(row.coverage_at_100),
  (row) => (row.share_of_oracle === null ? "-" : percent(row.share_of_oracle)),
];

function updateModels() {
  const table = byId("models");
  if (!table) return;
  const found = new Map(select({ item_type: state.type, segment: state.segment }).map((row) => [row.model, row]));
  const high = Math.max(...[...found.values()].map((row) => row.hr_at_10_high), 1e-9);
  const marks = ticks(0, high, 4);
  for (const tr of table.tBodies[0].rows) {
    const row = found.get(tr.dataset.model);
    tr.hidden = !row;
    if (!row) continue;
    const cells = [...tr.querySelectorAll("td:not(.forest)")];
    cells.forEach((cell, k) => (cell.textContent = SHOWN[k](row)));
    tr.querySelector(".forest").replaceChildren(intervalOf(row, high, marks.found));
  }
  table.tHead.querySelector(".forest").replaceChildren(axisOf(high, marks));
  const any = found.values().next().value;
  byId("models-caption").textContent = any
    ? `${SEGMENTS.get(state.segment).name}, ${typeName(state.type)}: ${count(any.users)} users, ` +
      `${count(any.queries)} lists per model.`
    : "No users in this selection.";
  resort(table);
}

// One row's dot and interval. Places are shares of the cell's width, so nothing has to be drawn again when it changes.
function intervalOf(row, high, marks) {
  const at = (value) => `${(100 * value) / high}%`;
  const y = "50%";
  return svg(
    "svg",
    { "aria-hidden": "true", "data-tip": describe(row) },
    ...marks.map((value) => svg("line", { x1: at(value), x2: at(value), y1: "-10%", y2: "112%", class: "gridline" })),
    svg("rect", { x: 0, y: 0, width: "100%", height: "100%", class: "hit" }),
    svg(
      "g",
      { class: `m-${roleOf(row.model)}` },
      svg("line", { x1: at(row.hr_at_10_low), x2: at(row.hr_at_10_high), y1: y, y2: y, class: "span" }),
      ...(row.per_seed ?? []).map((value) =>
        svg("line", { x1: at(value), x2: at(value), y1: "24%", y2: "76%", class: "seed" }),
      ),
      svg("circle", { cx: at(row.hr_at_10), cy: y, r: 5, class: "dot" }),
    ),
  );
}

function axisOf(high, marks) {
  const labels = marks.found.map((value) =>
    svg("text", { x: `${(100 * value) / high}%`, y: "70%", "text-anchor": "middle" }, marks.label(value)),
  );
  return svg("svg", { "aria-hidden": "true" }, ...labels);
}

// What a cell sorts by: a number if it begins with one.
function sortKey(cell) {
  const content = cell.textContent.trim();
  if (cell.tagName === "TH") return content.toLowerCase(); // a name may begin with a digit
  const number = Number.parseFloat(content.replace(/[,%]/g, ""));
  return Number.isNaN(number) ? (content === "-" ? -Infinity : content.toLowerCase()) : number;
}

function resort(table) {
  const column = [...table.tHead.rows[0].cells].findIndex((th) => !["none", null].includes(th.getAttribute("aria-sort")));
  if (column < 0) return;
  const sign = table.tHead.rows[0].cells[column].getAttribute("aria-sort") === "ascending" ? 1 : -1;
  const keyed = [...table.tBodies[0].rows].map((tr) => [sortKey(tr.cells[column]), tr]);
  keyed.sort(([a], [b]) => sign * (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1));
  table.tBodies[0].append(...keyed.map(([, tr]) => tr));
}

function makeSortable(table) {
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads) {
    head.querySelector("button")?.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = heads.indexOf(head) === 0 ? "ascending" : "descending";
      const next = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      resort(table);
    });
  }
}

function filterAll() {
  const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const tr of byId("all").tBodies[0].rows) {
    const content = [...tr.cells].slice(0, 3).map((cell) => cell.textContent).join(" ").toLowerCase();
    tr.hidden = !wanted.every((word) => content.includes(word));
    shown += !tr.hidden;
  }
  byId("filter-count").textContent = `${count(shown)} rows`;
}
