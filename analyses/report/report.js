// The tabs of the page: click or arrow keys; a shown tab's figures take its width.
const tabs = [...document.querySelectorAll("[role=tab]")];
function show(chosen) {
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
  }
  const plots = document.querySelectorAll("[role=tabpanel]:not([hidden]) .js-plotly-plot");
  plots.forEach((plot) => Plotly.Plots.resize(plot));
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    show(next);
    next.focus();
  });
});
show(tabs[0]);
