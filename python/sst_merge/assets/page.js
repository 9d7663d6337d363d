"use strict";

// Tables sort by a click on a column's head, again reverses. What is not there comes last either way.
const names = new Intl.Collator("en", { numeric: true });

function valueOf(cell) {
  const value = "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  return Number.isNaN(value) || value === "–" ? null : value;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : names.compare(a, b);
}

function sort(table, head) {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[head.cellIndex]), row]);
  rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  for (const head of table.tHead.rows[0].cells) {
    head.firstElementChild.addEventListener("click", () => sort(table, head));
  }
}

// Of pictures that show the same thing in different quantities, one at a time. Without this script, all.
for (const group of document.querySelectorAll(".alternatives")) {
  const figures = [...group.querySelectorAll("figure")];
  const select = document.createElement("select");
  for (const figure of figures) select.add(new Option(figure.querySelector("h3").textContent));
  const label = document.createElement("label");
  label.append("Show ", select);
  const show = () => figures.forEach((figure, i) => (figure.hidden = i !== select.selectedIndex));
  select.addEventListener("change", show);
  group.before(label);
  show();
}
