// Panels of dots and intervals: a row for each model, a panel for each item type, segment or whatever else.

// panels: [{title, note, marks: Map(model -> {value, low, high, seeds, tip})}]; order: models from top to bottom.
function drawForest(node, width, panels, order, { same, show = (value) => value.toFixed(3) }) {
  const shown = order.filter((model) => panels.some((panel) => panel.marks.has(model)));
  if (!panels.length || !shown.length) {
    node.replaceChildren(element("p", { class: "soft" }, "No data for this selection."));
    return;
  }
  const label = Math.min(Math.max(...shown.map((model) => textWidth(nameOf(model), 640))) + 14, width * 0.4);
  const most = Math.max(1, Math.floor((width - label) / 165));
  const columns = Math.ceil(panels.length / Math.ceil(panels.length / most));
  const gap = 26;
  const inner = (width - label - gap * (columns - 1)) / columns;
  const number = inner > 130 ? 44 : 0;
  const step = 23;
  const head = 44;
  const block = head + shown.length * step + 34;
  const ranges = panels.map((panel) => rangeOf([...panel.marks.values()]));
  const whole = [Math.min(...ranges.map((r) => r[0])), Math.max(...ranges.map((r) => r[1]))];
  const parts = panels.map((panel, k) => {
    const place = { left: label + (k % columns) * (inner + gap), top: Math.floor(k / columns) * block };
    const size = { inner: inner - number, number, step, head };
    return drawPanel(panel, shown, place, size, same ? whole : ranges[k], show);
  });
  const names = Array.from({ length: Math.ceil(panels.length / columns) }, (_, row) =>
    shown.map((model, k) => {
      const y = row * block + head + (k + 0.5) * step + 4;
      const role = roleOf(model);
      return text(0, y, cut(nameOf(model), label - 8), { class: role === "baseline" ? "" : `m-${role}` });
    }),
  );
  drawing(node, width, Math.ceil(panels.length / columns) * block, ...names.flat(), ...parts);
}

function rangeOf(marks) {
  const low = Math.min(0, ...marks.map((mark) => mark.low));
  const high = Math.max(0, ...marks.map((mark) => mark.high));
  return [low, high > low ? high : low + 1];
}

function drawPanel(panel, order, { left, top }, { inner, number, step, head }, [low, high], show) {
  const x = scale(low, high, left + 4, left + inner - 4);
  const bottom = top + head + order.length * step;
  const axis = ticks(low, high, Math.max(2, Math.floor(inner / 62)));
  const grid = axis.found.flatMap((value) => [
    line(x(value), top + head, x(value), bottom, Math.abs(value) < 1e-12 ? "zero" : "gridline"),
    text(x(value), bottom + 15, axis.label(value), { "text-anchor": "middle" }),
  ]);
  const rows = order.map((model, k) => {
    const mark = panel.marks.get(model);
    const y = top + head + (k + 0.5) * step;
    if (!mark) return null;
    return svg(
      "g",
      { class: `m-${roleOf(model)}`, "data-tip": mark.tip },
      svg("rect", { x: left, y: y - step / 2, width: inner + number, height: step, class: "hit" }),
      line(x(mark.low), y, x(mark.high), y, "span"),
      ...(mark.seeds ?? []).map((value) => line(x(value), y - 6, x(value), y + 6, "seed")),
      svg("circle", { cx: x(mark.value), cy: y, r: 4.5, class: "dot" }),
      number ? text(left + inner + number, y + 4, show(mark.value), { "text-anchor": "end" }) : null,
    );
  });
  return svg(
    "g",
    {},
    text(left, top + 14, cut(panel.title, inner + number), { class: "strong" }),
    text(left, top + 30, cut(panel.note, inner + number)),
    ...grid,
    ...rows,
  );
}

function panelOf(title, rows) {
  const marks = rows.map((row) => [
    row.model,
    { value: row.hr_at_10, low: row.hr_at_10_low, high: row.hr_at_10_high, seeds: row.per_seed, tip: describe(row) },
  ]);
  const note = rows.length ? `${count(rows[0].queries)} lists` : "no lists";
  return { title, note, marks: new Map(marks) };
}

function drawByType(node, width) {
  const panels = DATA.types.map((type) => panelOf(typeName(type), select({ item_type: type, segment: state.segment })));
  const order = ranking(state.type, state.segment);
  drawForest(node, width, panels.filter((panel) => panel.marks.size), order, { same: state.sameScale });
}

function drawBySegment(node, width) {
  const panels = DATA.segments
    .filter((segment) => !TIERS.includes(segment.id))
    .map((segment) => panelOf(segment.name, select({ item_type: state.type, segment: segment.id })));
  const order = ranking(state.type, state.segment);
  drawForest(node, width, panels.filter((panel) => panel.marks.size), order, { same: state.sameScale });
}

// The served model against each other one, on the same lists.
function drawDifferences(node, width) {
  const rows = DATA.differences
    .map((values) => Object.fromEntries(DATA.differenceColumns.map((name, k) => [name, values[k]])))
    .filter((row) => row.item_type === state.type && row.segment === state.segment && MODELS.has(row.against));
  const marks = rows.map((row) => [
    row.against,
    {
      value: row.difference,
      low: row.low,
      high: row.high,
      seeds: row.per_seed?.length > 1 ? row.per_seed : [],
      tip:
        `${nameOf(row.model)} against ${nameOf(row.against)}\n` +
        `${signed(row.difference)} (${signed(row.low)} to ${signed(row.high)})` +
        (row.relative === null ? "" : `\n${row.relative < 0 ? "\u2212" : "+"}${percent(Math.abs(row.relative))} relative`),
    },
  ]);
  const note = `${typeName(state.type)}, ${SEGMENTS.get(state.segment).name}`;
  const panels = marks.length ? [{ title: "Difference of HR@10", note, marks: new Map(marks) }] : [];
  const order = ranking(state.type, state.segment);
  drawForest(node, width, panels, order, { same: true, show: (value) => signed(value).replace(/.$/, "") });
}
