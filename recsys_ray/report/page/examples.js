// Users and their lists: who is shown, and whose lists stand side by side.

function startExamples() {
  const data = DATA.examples;
  if (!data || !byId("pick-left")) return;
  const articles = [...document.querySelectorAll(".user")];
  const buttons = [...document.querySelectorAll("[data-shows]")];
  const every = byId("every-user");
  const show = (wanted) => {
    for (const article of articles) article.hidden = wanted !== null && article.dataset.user !== wanted;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.shows === wanted));
    every.setAttribute("aria-pressed", String(wanted === null));
  };
  let before = "0";
  for (const button of buttons) button.addEventListener("click", () => show((before = button.dataset.shows)));
  every.addEventListener("click", () => show(every.getAttribute("aria-pressed") === "true" ? before : null));
  addEventListener("beforeprint", () => show(null));
  addEventListener("afterprint", () => show(before));
  show(before);
  const models = Object.keys(data.users[0]?.recommended ?? {});
  [["pick-left", data.served], ["pick-right", data.rival]].forEach(([id, first], side) => {
    const picker = byId(id);
    picker.append(...models.map((model) => element("option", { value: model }, nameOf(model))));
    picker.value = first;
    picker.addEventListener("change", () => {
      for (const article of articles) fillList(article, data.users[article.dataset.user], side, picker.value);
    });
  });

  function fillList(article, user, side, model) {
    const truths = new Set(user.truths);
    const lines = (user.recommended[model] ?? []).map((gid, k) => {
      const hit = truths.has(gid);
      const title = data.items[gid].title || data.items[gid].item_id;
      const tick = hit ? element("span", { "aria-label": "hit" }, " \u2713") : null;
      return element("li", { class: hit ? "is-hit" : null }, element("span", {}, `${k + 1}`), element("span", {}, title, tick));
    });
    const head = element("h4", { class: roleOf(model) }, nameOf(model));
    article.querySelector(`[data-list="${side}"]`).replaceChildren(head, element("ol", {}, ...lines));
  }
}
