/* The page is told when a part of it is opened or closed. */
document.addEventListener("toggle", (event) => {
  const part = event.target;
  if (part.matches?.("details[id]")) dash_clientside.set_props(part.id, { open: part.open });
}, true);
