// The map of the items: a canvas, since thousands of marks are slow in SVG. A type has a colour and a shape.

const SPACE_NAMES = { hgnn: "HGNN", text: "text only", "2t_hgnn": "two-tower" };
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "wedge"];

function startMap() {
  const data = DATA.map;
  const canvas = byId("map-canvas");
  if (!data || !canvas) return;
  const spaces = Object.keys(data.spaces);
  const view = { space: spaces[0], colour: "type", hidden: new Set(), at: null, pinned: false, x: [], y: [] };
  const brush = canvas.getContext("2d");
  let frame = 0;

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const titleOf = (k) => data.title[k] || data.id[k];
  const visible = (k) => !view.hidden.has(data.type[k]);

  function place(space) {
    const { x, y } = data.spaces[space];
    const [w, h, pad] = [canvas.clientWidth, canvas.clientHeight, 14];
    const [x0, x1, y0, y1] = [Math.min(...x), Math.max(...x), Math.min(...y), Math.max(...y)];
    const zoom = Math.min((w - 2 * pad) / (x1 - x0 || 1), (h - 2 * pad) / (y1 - y0 || 1));
    return { x: x.map((v) => w / 2 + (v - (x0 + x1) / 2) * zoom), y: y.map((v) => h / 2 - (v - (y0 + y1) / 2) * zoom) };
  }

  function paint() {
    const ratio = devicePixelRatio || 1;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
    if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, w, h);
    const near = view.at === null ? [] : data.spaces[view.space].near[view.at];
    const size = Math.max(2.2, Math.min(4, Math.sqrt((w * h) / data.title.length) / 4.5));
    const colours = colourTable();
    brush.globalAlpha = view.at === null ? 0.8 : 0.35;
    for (let k = 0; k < data.title.length; k++) if (visible(k)) mark(k, size, colours);
    brush.globalAlpha = 1;
    if (view.at === null) return;
    brush.strokeStyle = style("--soft");
    brush.lineWidth = 1;
    for (const k of near) {
      brush.beginPath();
      brush.moveTo(view.x[view.at], view.y[view.at]);
      brush.lineTo(view.x[k], view.y[k]);
      brush.stroke();
    }
    for (const k of near) mark(k, size + 1.5, colours);
    mark(view.at, size + 3, colours);
    brush.strokeStyle = style("--ink");
    brush.lineWidth = 2;
    brush.beginPath();
    brush.arc(view.x[view.at], view.y[view.at], size + 7, 0, 7);
    brush.stroke();
  }

  function colourTable() {
    const of = (names) => names.map(style);
    if (view.colour === "tier") return { list: of(["--tier1", "--tier2", "--tier3", "--tier4", "--tier5"]), by: data.tier };
    if (view.colour === "unseen") return { list: of(["--other-line", "--rival"]), by: data.unseen };
    return { list: of(data.types.map((_, k) => `--type${k % 8}`)), by: data.type };
  }

  function mark(k, r, colours) {
    brush.fillStyle = colours.list[colours.by[k]];
    outline(SHAPES[data.type[k] % SHAPES.length], view.x[k], view.y[k], r);
    brush.fill();
  }

  function outline(shape, x, y, r) {
    brush.beginPath();
    if (shape === "circle") brush.arc(x, y, r, 0, 7);
    else if (shape === "square") brush.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
    else if (shape === "cross") {
      brush.rect(x - r * 1.2, y - r * 0.4, r * 2.4, r * 0.8);
      brush.rect(x - r * 0.4, y - r * 1.2, r * 0.8, r * 2.4);
    } else {
      const corners = { triangle: [0, -1.3, 1.2, 0.9, -1.2, 0.9], diamond: [0, -1.4, 1.2, 0, 0, 1.4, -1.2, 0], wedge: [0, 1.3, 1.2, -0.9, -1.2, -0.9] }[shape];
      for (let c = 0; c < corners.length; c += 2) brush[c ? "lineTo" : "moveTo"](x + r * corners[c], y + r * corners[c + 1]);
      brush.closePath();
    }
  }

  function moveTo(space) {
    const target = place(space);
    const from = { x: view.x, y: view.y };
    const still = !from.x.length || space === view.space || matchMedia("(prefers-reduced-motion: reduce)").matches;
    view.space = space;
    cancelAnimationFrame(frame);
    if (still) {
      Object.assign(view, target);
      return paint();
    }
    const begin = performance.now();
    const step = (now) => {
      const share = Math.min(Math.max((now - begin) / 600, 0), 1);
      const ease = share * share * (3 - 2 * share);
      view.x = from.x.map((v, k) => v + (target.x[k] - v) * ease);
      view.y = from.y.map((v, k) => v + (target.y[k] - v) * ease);
      paint();
      if (share < 1) frame = requestAnimationFrame(step);
    };
    frame = requestAnimationFrame(step);
  }

  function tell() {
    const aside = byId("map-item");
    const k = view.at;
    if (k === null) {
      const shares = spaces.map((s) => `${SPACE_NAMES[s] ?? s} ${percent(data.spaces[s].same_type)}`).join(", ");
      return aside.replaceChildren(
        element("p", {}, element("strong", {}, "Point at an item"), ", or press arrow keys on the map."),
        element("p", { class: "soft" }, `Of an item's ${data.spaces[spaces[0]].near[0].length} nearest neighbours, the share of its own type: ${shares}.`),
      );
    }
    const facts = [data.types[data.type[k]], `popularity tier ${data.tier[k] + 1}`];
    if (data.unseen[k]) facts.push("unseen in training");
    const near = data.spaces[view.space].near[k].map((other) =>
      element("li", {}, titleOf(other), " ", element("span", { class: "soft" }, `(${data.types[data.type[other]]})`)),
    );
    aside.replaceChildren(
      element("p", {}, element("strong", {}, titleOf(k)), element("br"), element("span", { class: "soft" }, facts.join(", "))),
      element("span", { class: "soft" }, `Nearest, ${SPACE_NAMES[view.space] ?? view.space}`),
      element("ol", {}, ...near),
    );
  }

  function choose(k) {
    if (k === view.at) return;
    view.at = k;
    tell();
    paint();
  }

  function closest(x, y, reach) {
    let [best, found] = [reach * reach, null];
    for (let k = 0; k < view.x.length; k++) {
      const apart = (view.x[k] - x) ** 2 + (view.y[k] - y) ** 2;
      if (apart < best && visible(k)) [best, found] = [apart, k];
    }
    return found;
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const k = closest(event.clientX - box.left, event.clientY - box.top, 14);
    if (k === null) hideTip();
    else showTip(`${titleOf(k)}\n${data.types[data.type[k]]}`, event.clientX, event.clientY);
    if (!view.pinned || k !== null) choose(k);
  });
  canvas.addEventListener("pointerleave", () => (hideTip(), view.pinned || choose(null)));
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    view.pinned = true;
    if (view.at === null) return choose(closest(canvas.clientWidth / 2, canvas.clientHeight / 2, 1e6));
    let [best, found] = [Infinity, view.at];
    for (let k = 0; k < view.x.length; k++) {
      const [dx, dy] = [view.x[k] - view.x[view.at], view.y[k] - view.y[view.at]];
      const along = dx * way[0] + dy * way[1];
      const aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (k !== view.at && along > 0 && aside <= along && along + aside < best && visible(k)) [best, found] = [along + aside, k];
    }
    choose(found);
  });
  byId("find-item").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    const titles = data.title.map((title) => title.toLowerCase());
    const exact = titles.indexOf(wanted);
    const found = exact >= 0 ? exact : wanted.length > 2 ? titles.findIndex((title) => title.includes(wanted)) : -1;
    view.pinned = found >= 0;
    choose(found >= 0 ? found : null);
  });
  byId("map-titles").append(...data.title.map((title) => element("option", { value: title })));
  choice(byId("pick-space"), spaces.map((s) => [s, SPACE_NAMES[s] ?? s]), () => view.space, (s) => (moveTo(s), tell()));
  const colours = [["type", "item type"], ["tier", "popularity tier"], ["unseen", "unseen in training"]];
  byId("pick-colour").append(...colours.map(([value, name]) => element("option", { value }, name)));
  byId("pick-colour").addEventListener("change", (event) => ((view.colour = event.target.value), keys(), paint()));

  function keys() {
    const types = data.types.map((name, k) => {
      const on = () => !view.hidden.has(k);
      const colour = view.colour === "type" ? `--type${k % 8}` : "--soft";
      const button = element("button", { type: "button", class: "toggle", "aria-pressed": String(on()) }, shapeIcon(k, colour), name);
      button.addEventListener("click", () => {
        if (on()) view.hidden.add(k);
        else view.hidden.delete(k);
        button.setAttribute("aria-pressed", on());
        paint();
      });
      return button;
    });
    const others = {
      tier: TIERS.map((_, k) => [`--tier${k + 1}`, k === 0 ? "1 head" : k === 4 ? "5 tail" : `${k + 1}`]),
      unseen: [["--other-line", "seen"], ["--rival", "unseen in training"]],
    }[view.colour];
    const list = (others ?? []).map(([colour, name]) =>
      element("span", { class: "label" }, element("i", { style: `width: .8rem; height: .8rem; background: var(${colour})` }), name),
    );
    byId("map-keys").replaceChildren(...types, ...list);
  }

  function shapeIcon(k, colour) {
    const corners = {
      square: "M2 2h12v12H2z", triangle: "M8 1l7 13H1z", diamond: "M8 0l7 8-7 8-7-8z", wedge: "M8 15L1 2h14z",
      cross: "M6 1h4v5h5v4h-5v5H6v-5H1V6h5z", circle: "M8 1a7 7 0 1 1 0 14A7 7 0 0 1 8 1z",
    };
    const shape = svg("path", { d: corners[SHAPES[k % SHAPES.length]], style: `fill: var(${colour})` });
    return svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, shape);
  }

  keys();
  tell();
  new ResizeObserver(() => canvas.clientWidth && (Object.assign(view, place(view.space)), paint())).observe(canvas);
  document.addEventListener("themechange", paint);
}
