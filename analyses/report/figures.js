// Figures follow the reader's system: light colours, or dark ones where it asks for them; on paper
// they are light. DARK says what some colours become; the others keep their hue and turn their
// lightness round.
(() => {
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const given = new WeakMap(); // the light figure of each plot
  let printing = false;

  const NAMED = { white: "#ffffff", black: "#000000" };
  const parts = (color) => {
    const text = NAMED[color] ?? color;
    if (/^#[0-9a-f]{6}$/i.test(text)) return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
    return /^rgba?\([\d., ]+\)$/.test(text) ? text.match(/[\d.]+/g).map(Number) : null;
  };
  const turned = (color) => {
    if (color in DARK) return DARK[color];
    const found = parts(color);
    if (!found) return color;
    const light = found.slice(0, 3).map((x) => 0.9 - (0.8 * x) / 255);
    const luma = 0.213 * light[0] + 0.715 * light[1] + 0.072 * light[2];
    const bytes = light.map((x) => Math.round(255 * Math.min(1, Math.max(0, 2 * luma - x))));
    return `rgba(${bytes.join(", ")}, ${found[3] ?? 1})`;
  };

  const DATA = new Set(["x", "y", "z", "text", "customdata", "hovertext"]);
  const swapped = (value, key) => {
    if (DATA.has(key) && typeof value !== "string") return value;
    if (typeof value === "string") {
      if (/color/i.test(key)) return turned(value);
      return value.replace(/(color:\s*)(#[0-9a-f]{6})/gi, (_, word, color) => word + turned(color));
    }
    if (Array.isArray(value)) return value.map((each) => swapped(each, key));
    if (value === null || typeof value !== "object" || ArrayBuffer.isView(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, swapped(each, name)]));
  };

  const wrapped = (plotly) => {
    for (const name of ["newPlot", "react"]) {
      const draw = plotly[name];
      plotly[name] = (where, data, layout, config) => {
        const plot = typeof where === "string" ? document.getElementById(where) : where;
        const figure = Array.isArray(data) ? { data, layout, config } : data;
        given.set(plot, figure);
        return draw(plot, dark.matches && !printing ? swapped(figure, "") : figure);
      };
    }
    return plotly;
  };
  if (window.Plotly) wrapped(window.Plotly);
  else {
    let loaded;
    Object.defineProperty(window, "Plotly", { get: () => loaded, set: (plotly) => { loaded = wrapped(plotly); } });
  }

  const redraw = () => {
    for (const plot of document.querySelectorAll(".js-plotly-plot"))
      if (given.has(plot)) Plotly.react(plot, given.get(plot));
  };
  const print = (on) => () => {
    printing = on;
    if (matchMedia("(prefers-color-scheme: dark)").matches) redraw();
  };
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
})();
