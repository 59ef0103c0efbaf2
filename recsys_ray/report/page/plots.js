// Recall against coverage, score over popularity, shares of the tiers, learning curves, events over time.

function drawScatter(node, width) {
  const rows = select({ item_type: state.type, segment: state.segment });
  if (!rows.length) return node.replaceChildren(element("p", { class: "soft" }, "No data for this selection."));
  const height = Math.round(Math.min(460, Math.max(320, width * 0.46)));
  const [left, right, top, bottom] = [46, 16, 12, height - 42];
  const across = ticks(0, Math.max(...rows.map((row) => row.coverage_at_100), 0.01) * 1.04, Math.max(3, width / 110));
  const up = ticks(0, Math.max(...rows.map((row) => row.hr_at_10_high), 0.001) * 1.04, 6);
  const x = scale(0, Math.max(...rows.map((row) => row.coverage_at_100), 0.01) * 1.04, left, width - right);
  const y = scale(0, Math.max(...rows.map((row) => row.hr_at_10_high), 0.001) * 1.04, bottom, top);
  const grid = [
    ...up.found.flatMap((v) => [
      line(left, y(v), width - right, y(v), v ? "gridline" : "axis"),
      text(left - 8, y(v) + 4, up.label(v), { "text-anchor": "end" }),
    ]),
    ...across.found.flatMap((v) => [
      line(x(v), top, x(v), bottom, v ? "gridline" : "axis"),
      text(x(v), bottom + 17, `${Math.round(1000 * v) / 10}%`, { "text-anchor": "middle" }),
    ]),
    text(left, top + 2, "HR@10", { class: "strong halo", dx: 6, dy: 6 }),
    text(width - right, bottom + 36, "coverage@100: share of the catalogue in anyone's top 100", { "text-anchor": "end", class: "strong" }),
  ];
  if (width < 460) grid.at(-1).textContent = "coverage@100";
  const points = rows.map((row) => ({
    row,
    x: x(row.coverage_at_100),
    y: y(row.hr_at_10),
    top: y(row.hr_at_10_high),
    bottom: y(row.hr_at_10_low),
  }));
  const marks = points.map((p) =>
    svg(
      "g",
      { class: `m-${roleOf(p.row.model)}`, "data-tip": `${describe(p.row)}\ncoverage@100 ${percent(p.row.coverage_at_100)}` },
      line(p.x, y(p.row.hr_at_10_low), p.x, y(p.row.hr_at_10_high), "span"),
      svg("circle", { cx: p.x, cy: p.y, r: 6.5, class: "dot" }),
      svg("circle", { cx: p.x, cy: p.y, r: 14, class: "hit" }),
    ),
  );
  const labels = placeLabels(points, { left, right: width - right, top, bottom }).map((l) =>
    text(l.x, l.y, l.text, { class: `halo m-${roleOf(l.model)}` }),
  );
  drawing(node, width, height, ...grid, ...marks, ...labels);
}

// Where names stand beside their points: the first of several places that meets no point, interval or other name.
function placeLabels(points, bounds) {
  const taken = points.flatMap((p) => [
    { x: p.x - 8, y: p.y - 8, w: 16, h: 16 },
    { x: p.x - 2, y: p.top, w: 4, h: p.bottom - p.top },
  ]);
  const meets = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const first = { served: 0, rival: 1, part: 2, oracle: 3, baseline: 4, control: 5 };
  const order = [...points].sort((a, b) => first[roleOf(a.row.model)] - first[roleOf(b.row.model)]);
  return order.map((p) => {
    const name = cut(nameOf(p.row.model), (bounds.right - bounds.left) * 0.4);
    const w = textWidth(name, 640) + 2;
    const h = 15;
    const places = [
      [11, -h / 2], [-11 - w, -h / 2], [9, -h - 5], [9, 5], [-w - 9, -h - 5], [-w - 9, 5], [-w / 2, -h - 10],
      [-w / 2, 10], [11, -h - 18], [11, 18], [-11 - w, -h - 18], [-11 - w, 18], [14, 32], [14, -h - 32],
    ].map(([dx, dy]) => ({ x: p.x + dx, y: p.y + dy, w, h }));
    const cost = (box) =>
      taken.filter((other) => meets(box, other)).length +
      4 * (box.x < bounds.left || box.x + w > bounds.right || box.y < bounds.top || box.y + h > bounds.bottom);
    const best = places.reduce((a, b) => (cost(b) < cost(a) ? b : a));
    taken.push(best);
    return { x: best.x, y: best.y + 11.5, text: name, model: p.row.model };
  });
}

// Names at the right end of lines, moved apart where they would overlap.
function spread(labels, step, low, high) {
  const sorted = [...labels].sort((a, b) => a.y - b.y);
  for (let k = 0; k < sorted.length; k++) {
    sorted[k].y = Math.max(sorted[k].y, k ? sorted[k - 1].y + step : low);
  }
  for (let k = sorted.length - 1; k >= 0; k--) {
    sorted[k].y = Math.min(sorted[k].y, k < sorted.length - 1 ? sorted[k + 1].y - step : high);
  }
  return sorted;
}

function drawTiers(node, width) {
  const order = ranking(state.type, DATA.segment);
  const lines = order
    .map((model) => ({
      model,
      points: TIERS.map((tier, k) => ({ k, row: select({ item_type: state.type, segment: tier, model })[0] })).filter((p) => p.row),
    }))
    .filter((l) => l.points.length);
  if (!lines.length) return node.replaceChildren(element("p", { class: "soft" }, "No data for this selection."));
  const height = Math.max(300, 60 + 16 * lines.length);
  const names = Math.min(Math.max(...lines.map((l) => textWidth(nameOf(l.model), 640))) + 12, width * 0.36);
  const [left, top, bottom, right] = [44, 14, height - 40, width - names];
  const high = Math.max(...lines.flatMap((l) => l.points.map((p) => p.row.hr_at_10_high)), 1e-6);
  const x = scale(0, 4, left + 12, right - 12);
  const y = scale(0, high, bottom, top);
  const up = ticks(0, high, 5);
  const grid = up.found.flatMap((v) => [
    line(left, y(v), right, y(v), v ? "gridline" : "axis"),
    text(left - 8, y(v) + 4, up.label(v), { "text-anchor": "end" }),
  ]);
  grid.push(
    ...TIERS.map((_, k) => text(x(k), bottom + 17, `${k + 1}`, { "text-anchor": "middle" })),
    text(x(0) - 12, bottom + 34, "head", {}),
    text(x(4) + 12, bottom + 34, "tail", { "text-anchor": "end" }),
    text((left + right) / 2, bottom + 34, "popularity tier", { "text-anchor": "middle" }),
  );
  const back = [...lines].sort((a, b) => weight(a.model) - weight(b.model)); // the two that matter on top
  const drawn = back.map(({ model, points }) => {
    const role = roleOf(model);
    const path = points.map((p, k) => `${k ? "L" : "M"}${x(p.k)} ${y(p.row.hr_at_10)}`).join("");
    const there = points.map((p) => `${x(p.k)} ${y(p.row.hr_at_10_high)}`);
    const back = [...points].reverse().map((p) => `${x(p.k)} ${y(p.row.hr_at_10_low)}`);
    const group = svg(
      "g",
      { class: `m-${role}`, "data-model": model },
      ["served", "rival"].includes(role) ? svg("polygon", { points: [...there, ...back].join(" "), class: "band" }) : null,
      svg("path", { d: path, class: "line" }),
      ...points.flatMap((p) => [
        ["served", "rival"].includes(role) ? svg("circle", { cx: x(p.k), cy: y(p.row.hr_at_10), r: 4, class: "dot" }) : null,
        svg("circle", { cx: x(p.k), cy: y(p.row.hr_at_10), r: 9, class: "hit", "data-tip": describe(p.row) }),
      ]),
    );
    return group;
  });
  const ends = lines.map((l) => ({ model: l.model, at: y(l.points.at(-1).row.hr_at_10), y: y(l.points.at(-1).row.hr_at_10) }));
  const labels = spread(ends, 15, top + 4, bottom + 2).flatMap((l) => [
    Math.abs(l.y - l.at) > 3 ? line(right - 10, l.at, right - 1, l.y, "axis") : null,
    text(right + 3, l.y + 4, cut(nameOf(l.model), names - 4), { class: `m-${roleOf(l.model)}`, "data-model": l.model }),
  ]);
  drawing(node, width, height, ...grid, ...drawn, ...labels);
  lightUp(node);
}

const weight = (model) => ({ served: 3, rival: 2, part: 1 })[roleOf(model)] ?? 0;

// Pointing at a model's line or name brings it out.
function lightUp(node) {
  const parts = [...node.querySelectorAll("[data-model]")];
  const mark = (model) =>
    parts.forEach((part) => {
      part.classList.toggle("lit", part.dataset.model === model);
      part.classList.toggle("faded", model !== null && part.dataset.model !== model && part.tagName === "g");
    });
  parts.forEach((part) => {
    part.addEventListener("pointerenter", () => mark(part.dataset.model));
    part.addEventListener("pointerleave", () => mark(null));
  });
}

function drawShares(node, width) {
  const { recommended, chosen } = DATA.popularity;
  const segment = chosen[state.segment] ? state.segment : DATA.segment;
  const order = ranking(state.type, segment).filter((model) => recommended[model]?.[segment]?.[state.type]);
  const rows = order.map((model) => ({ name: nameOf(model), role: roleOf(model), shares: recommended[model][segment][state.type] }));
  if (chosen[segment]?.[state.type]) {
    rows.unshift({ name: "users' own choices", role: "oracle", shares: chosen[segment][state.type], apart: true });
  }
  const label = Math.min(Math.max(...rows.map((row) => textWidth(row.name, 640)), 40) + 12, width * 0.38);
  const step = 24;
  const top = 30;
  let y = top;
  const room = width - label;
  const keys = TIERS.map((_, k) => {
    const name = k === 0 ? "1 head" : k === 4 ? "5 tail" : `${k + 1}`;
    const at = (room > 300 ? label : 0) + k * Math.min(64, width / 5);
    return svg("g", {}, svg("rect", { x: at, y: 2, width: 12, height: 12, style: `fill: var(--tier${k + 1})` }), text(at + 16, 12, name));
  });
  const bars = rows.map((row) => {
    let x = label;
    const parts = row.shares.flatMap((share, k) => {
      const wide = share * room;
      const tipText = `${row.name}\ntier ${k + 1}${k === 0 ? " (head)" : k === 4 ? " (tail)" : ""}: ${percent(share)}`;
      const rect = svg("rect", { x, y, width: Math.max(wide - 1, 0), height: 17, style: `fill: var(--tier${k + 1})`, "data-tip": tipText });
      const inside = k === 0 && wide > 40 ? text(x + 6, y + 13, percent(share), { style: "fill: var(--tier1-ink); pointer-events: none" }) : null;
      x += wide;
      return [rect, inside];
    });
    const name = text(0, y + 13, cut(row.name, label - 8), { class: row.apart ? "strong" : `m-${row.role}` });
    y += step + (row.apart ? 8 : 0);
    return svg("g", {}, name, ...parts);
  });
  drawing(node, width, y, ...keys, ...bars);
}

function drawCurve(node, width, curve) {
  const names = Object.keys(curve.series);
  const isValid = (name) => name.startsWith("valid");
  const shown = (name) => (isValid(name) ? "validation" : "training");
  const height = 200;
  const ends = names.length > 1 ? 66 : 14;
  const points = names.flatMap((name) => curve.series[name]);
  const values = points.map((p) => p[1]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  const up = ticks(low - pad, high + pad, 4);
  const left = Math.max(...up.found.map((v) => textWidth(up.label(v)))) + 10;
  const [top, bottom, right] = [12, height - 26, width - ends];
  const last = Math.max(...points.map((p) => p[0]));
  const x = scale(Math.min(...points.map((p) => p[0])), last, left + 6, right - 6);
  const y = scale(low - pad, high + pad, bottom, top);
  const across = last > 1 ? ticks(1, last, Math.max(2, Math.min(last, Math.floor(width / 55)))).found : [1];
  const grid = [
    ...up.found.flatMap((v) => [line(left, y(v), right, y(v), "gridline"), text(left - 6, y(v) + 4, up.label(v), { "text-anchor": "end" })]),
    ...across.filter(Number.isInteger).map((v) => text(x(v), bottom + 17, `${v}`, { "text-anchor": "middle" })),
  ];
  const drawn = names.map((name) => {
    const series = curve.series[name];
    const path = series.map((p, k) => `${k ? "L" : "M"}${x(p[0])} ${y(p[1])}`).join("");
    const best = series.reduce((a, b) => ((curve.best === "low" ? b[1] < a[1] : b[1] > a[1]) ? b : a));
    return svg(
      "g",
      { class: isValid(name) ? "m-served" : "m-baseline" },
      svg("path", { d: path, class: "line" }),
      ...series.map((p) =>
        svg("circle", {
          cx: x(p[0]), cy: y(p[1]), r: series.length > 40 ? 1.5 : 2.5, class: "dot", style: "stroke: none",
          "data-tip": `${curve.model}\nepoch ${p[0]}: ${name} ${p[1].toFixed(4)}`,
        }),
      ),
      isValid(name) ? svg("circle", { cx: x(best[0]), cy: y(best[1]), r: 6, style: "fill: none; stroke: var(--mark); stroke-width: 1.5" }) : null,
    );
  });
  const labels = spread(
    names.map((name) => ({ name, y: y(curve.series[name].at(-1)[1]) })), 15, top, bottom,
  ).map((l) => text(right + 2, l.y + 4, shown(l.name), { class: isValid(l.name) ? "m-served" : "" }));
  drawing(node, width, height, ...grid, ...drawn, ...(names.length > 1 ? labels : []));
}

function drawTimeline(node, width) {
  const time = DATA.timeline;
  const height = 170;
  const [left, right, top, bottom] = [46, width - 4, 26, height - 24];
  const span = time.days * 86400;
  const end = time.from + time.events.length * span;
  const x = scale(time.from, end, left, right);
  const high = Math.max(...time.events, 1);
  const y = scale(0, high, bottom, top);
  const up = ticks(0, high, 3);
  const periods = time.test_from
    ? [["training", time.from, time.valid_from], ["validation", time.valid_from, time.test_from], ["test", time.test_from, time.end]]
    : [];
  const shades = periods.map(([name, from, to], k) =>
    svg("rect", { x: x(from), y: top - 20, width: Math.max(x(to) - x(from), 1), height: bottom - top + 20, style: "fill: var(--served)", opacity: k * 0.09, "data-tip": `${name}: ${day(from)} to ${day(to - 1)}` }),
  );
  let edge = right;
  const heads = [...periods].reverse().map(([name, from, to]) => {
    // A short period at the right end has its name to the left of it, clear of the next one's.
    const centre = Math.min((x(from) + x(to)) / 2, edge - textWidth(name) / 2);
    edge = centre - textWidth(name) / 2 - 8;
    return text(centre, top - 8, name, { "text-anchor": "middle", style: "pointer-events: none" });
  });
  const bars = time.events.map((events, k) => {
    const from = time.from + k * span;
    const label = time.days === 1 ? day(from) : `${day(from)}, ${time.days} days`;
    return svg("rect", {
      x: x(from), y: y(events), width: Math.max((right - left) / time.events.length - 0.6, 0.6), height: Math.max(bottom - y(events), 0),
      style: `fill: var(${from + span / 2 >= (time.test_from ?? Infinity) ? "--served" : "--other-line"})`,
      "data-tip": `${label}\n${count(events)} positive events`,
    });
  });
  const months = monthTicks(time.from, end, Math.max(2, Math.floor(width / 90)));
  const grid = [
    ...up.found.flatMap((v) => [line(left, y(v), right, y(v), "gridline"), text(left - 6, y(v) + 4, count(Math.round(v)), { "text-anchor": "end" })]),
    ...months.flatMap((m) => [line(x(m.at), bottom, x(m.at), bottom + 4, "axis"), text(x(m.at), bottom + 17, m.name, { "text-anchor": x(m.at) > right - 24 ? "end" : "middle" })]),
  ];
  drawing(node, width, height, ...shades, ...grid, ...bars, ...heads);
}

function monthTicks(from, to, wanted) {
  const begin = new Date(1000 * from);
  const months = (to - from) / 86400 / 30.4;
  const step = [1, 2, 3, 6, 12, 24, 60, 120].find((s) => months / s <= wanted) ?? 240;
  const found = [];
  for (let k = Math.ceil((begin.getUTCFullYear() * 12 + begin.getUTCMonth() + 1) / step) * step; ; k += step) {
    const at = Date.UTC(Math.floor(k / 12), k % 12, 1) / 1000;
    if (at > to) return found;
    const year = Math.floor(k / 12);
    found.push({ at, name: step >= 12 ? `${year}` : `${year}-${String((k % 12) + 1).padStart(2, "0")}` });
  }
}
