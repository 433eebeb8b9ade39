// What a browser is asked about the texts of drawn figures: which of them leave their figure, and
// which pairs of texts, legends and colour bars lie on each other, by how many pixels.
(() => {
  const box = (element, what) => {
    const lines = [...element.querySelectorAll("tspan.line")].filter((line) => line.textContent.trim());
    const all = (lines.length ? lines : [element]).map((each) => each.getBoundingClientRect());
    const side = (choose, name) => choose(...all.map((each) => each[name]));
    return {
      what: what ?? element.textContent.trim().slice(0, 40),
      left: side(Math.min, "left"), right: side(Math.max, "right"),
      top: side(Math.min, "top"), bottom: side(Math.max, "bottom"),
      turned: /rotate\((?!0)/.test(element.getAttribute("transform") ?? ""),
    };
  };
  const overlap = (a, b) => Math.min(
    Math.min(a.right, b.right) - Math.max(a.left, b.left),
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top),
  );
  const found = [];
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    if (!plot.clientWidth) continue;
    const texts = (selector) => [...plot.querySelectorAll(selector)]
      .filter((each) => each.textContent.trim() && each.getBoundingClientRect().width)
      .map((each) => box(each));
    const shapes = (selector, what) => [...plot.querySelectorAll(selector)].map((each) => box(each, what));
    const own = plot.getBoundingClientRect();
    const titles = texts(".annotation-text, [class$=title]:not(g), .gtitle");
    const ticks = texts(".cartesianlayer [class$=tick] text"), marks = texts(".cbaxis text");
    const keys = texts(".legendtext");
    const areas = [...shapes(".cbfills", "a colour bar"), ...shapes("[class^=legend] > .bg", "a legend")];
    for (const each of [...titles, ...ticks, ...keys, ...areas]) {
      const by = Math.max(own.left - each.left, each.right - own.right, own.top - each.top, each.bottom - own.bottom);
      if (by > 1) found.push([plot.id, "cut", each.what, Math.round(by)]);
    }
    const pair = (a, b) => {
      const by = overlap(a, b);
      if (by > 1.5 && !(a.turned && b.turned)) found.push([plot.id, a.what, b.what, Math.round(by)]);
    };
    const among = (group) => group.forEach((a, i) => group.slice(i + 1).forEach((b) => pair(a, b)));
    [titles, ticks, keys].forEach(among);
    for (const a of titles) for (const b of [...ticks, ...marks, ...areas]) pair(a, b);
    for (const a of keys) for (const b of [...ticks, ...areas.filter((each) => each.what !== "a legend")]) pair(a, b);
  }
  return found;
})()
