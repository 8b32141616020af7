// Makes tables of nbhelpers/tables.py sortable by a click on a heading and filterable by words; they read without it.
(() => {
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

  function compare(a, b) {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? Infinity : -Infinity; // empty cells stay last
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  }

  function sort(table, column) {
    const head = table.tHead.rows[0].cells;
    const down = head[column].getAttribute("aria-sort") === "ascending";
    for (const cell of head) cell.removeAttribute("aria-sort");
    head[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const order = compare(value(one, column), value(other, column));
      return Math.sign(down && Number.isFinite(order) ? -order : order);
    });
    table.tBodies[0].append(...rows);
  }

  function setUp(table) {
    table.dataset.ready = "yes";
    const rows = [...table.tBodies[0].rows];
    const bar = document.createElement("div");
    const field = Object.assign(document.createElement("input"), {
      type: "search", placeholder: "show rows with these words", ariaLabel: "filter the table", size: 32,
    });
    const count = document.createElement("small");
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      count.textContent = ` ${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    };
    field.addEventListener("input", filter);
    field.addEventListener("keydown", (event) => event.stopPropagation()); // letters are JupyterLab's short cuts
    bar.append(field, count);
    table.parentElement.before(bar);
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      cell.tabIndex = 0;
      cell.title = "click to sort";
      cell.addEventListener("click", () => sort(table, column));
      cell.addEventListener("keydown", (event) => event.key === "Enter" && sort(table, column));
    });
    filter();
  }

  const start = () => document.querySelectorAll("table.nb-sortable:not([data-ready])").forEach(setUp);
  start();
  for (const wait of [100, 1000]) setTimeout(start, wait); // JupyterLab runs this before the table is on the page
})();
