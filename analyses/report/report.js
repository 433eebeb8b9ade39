// The tabs of the page: click or arrow keys; a shown tab's figures take its width. A link to a
// figure opens its tab.
const tabs = [...document.querySelectorAll("[role=tab]")];
const panel = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
function show(chosen) {
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    panel(tab).hidden = !on;
  }
  const plots = document.querySelectorAll("[role=tabpanel]:not([hidden]) .js-plotly-plot");
  plots.forEach((plot) => Plotly.Plots.resize(plot));
}
function follow() {
  const aim = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const owner = tabs.find((tab) => aim && panel(tab).contains(aim));
  if (!owner) return;
  show(owner);
  aim.scrollIntoView();
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
addEventListener("hashchange", follow);
show(tabs[0]);
follow();
