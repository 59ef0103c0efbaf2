// Puts the parts together: what can be chosen, what is drawn, light and dark, paper.

// A row of buttons of which one is pressed.
function choice(node, options, current, set) {
  if (!node) return;
  const buttons = options.map(([value, name]) => {
    const button = element("button", { type: "button", "aria-pressed": String(value === current()) }, name);
    button.addEventListener("click", () => {
      set(value);
      buttons.forEach((other, k) => other.setAttribute("aria-pressed", options[k][0] === current()));
    });
    return button;
  });
  node.replaceChildren(...buttons);
}

function choose(change) {
  Object.assign(state, change);
  updateModels();
  redraw();
}

function startControls() {
  const types = DATA.types.map((type) => [type, type]);
  choice(byId("pick-type"), types, () => state.type, (type) => choose({ type }));
  const picker = byId("pick-segment");
  picker.append(...DATA.segments.map((s) => element("option", { value: s.id, title: s.note }, s.name)));
  picker.value = state.segment;
  picker.addEventListener("change", () => choose({ segment: picker.value }));
  byId("same-scale").addEventListener("change", (event) => choose({ sameScale: event.target.checked }));
  const roles = [
    ["served", "the served model", ""], ["part", "a part or variant of it", "hollow"], ["rival", "the best baseline", ""],
    ["baseline", "other baselines", ""], ["control", "a control", "hollow"], ["oracle", "the oracle", "hollow"],
  ].filter(([role]) => DATA.models.some((model) => roleOf(model.id) === role));
  byId("role-keys").append(
    ...roles.map(([role, name, hollow]) => element("li", { class: `m-${role}` }, element("i", { class: `round ${hollow}` }), name)),
  );
}

function startTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const changed = () => document.dispatchEvent(new Event("themechange"));
  let kept = null;
  try {
    kept = localStorage.getItem("recsys-ray-theme"); // a file's storage may be closed
  } catch {}
  if (kept) root.dataset.theme = kept;
  system.addEventListener("change", changed);
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    root.dataset.theme = dark ? "light" : "dark";
    try {
      localStorage.setItem("recsys-ray-theme", root.dataset.theme);
    } catch {}
    changed();
  });
  addEventListener("beforeprint", () => {
    kept = root.dataset.theme ?? null;
    root.dataset.theme = "light"; // the canvas, too
    changed();
  });
  addEventListener("afterprint", () => {
    if (kept) root.dataset.theme = kept;
    else delete root.dataset.theme;
    changed();
  });
}

function startNavigation() {
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const id of links.keys()) if (byId(id)) seen.observe(byId(id));
}

startTheme();
startNavigation();
if (byId("all")) {
  makeSortable(byId("all"));
  byId("filter").addEventListener("input", filterAll);
}
if (byId("models")) {
  startControls();
  makeSortable(byId("models"));
  updateModels();
  chart("differences", drawDifferences);
  chart("by-type", drawByType);
  chart("by-segment", drawBySegment);
  chart("scatter", drawScatter);
  chart("tiers", drawTiers);
  if (DATA.popularity) chart("shares", drawShares);
}
for (const curve of DATA.curves) {
  const node = element("div", { class: "chart", "data-title": `${curve.model}: ${curve.title}` });
  const head = element("figcaption", {}, element("strong", {}, curve.model), curve.title);
  byId("curves").append(element("figure", {}, head, node));
  chart(node, (target, width) => drawCurve(target, width, curve));
}
if (DATA.timeline) chart("timeline", drawTimeline);
startMap();
startExamples();
document.documentElement.dataset.ready = "true";
