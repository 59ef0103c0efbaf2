// Users and their lists: which kind is shown, and whose lists stand side by side.

function startExamples() {
  const data = DATA.examples;
  if (!data || !byId("pick-kind")) return;
  const articles = [...document.querySelectorAll(".user")];
  byId("pick-kind").addEventListener("change", (event) => {
    for (const article of articles) article.hidden = event.target.value !== "" && article.dataset.kind !== event.target.value;
  });
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
