/* A button with data-copy copies that text, and says for two seconds whether it could. */
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.dataset.said = "copied";
  } catch {
    button.dataset.said = "not allowed: select the name";
  }
  setTimeout(() => delete button.dataset.said, 2000);
});
