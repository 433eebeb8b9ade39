/* On a board a click selects what a cell holds, and the arrow keys go to the next cell. */
document.addEventListener("focusin", (event) => {
  if (event.target.closest(".board")) event.target.select?.();
});
document.addEventListener("keydown", (event) => {
  const board = event.target.closest?.(".board");
  if (!board) return;
  const fields = [...board.querySelectorAll("input")];
  const side = Math.sqrt(fields.length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  fields[fields.indexOf(event.target) + step]?.focus();
});
