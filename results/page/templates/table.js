// Sorts tables by their headings, filters the rows of the leaderboard, and keeps both in the URL, so that links reproduce the view.
(() => {
  const drawn = 100; // rows of a long table; the same number as in the style sheet
  const number = new Intl.NumberFormat("en");
  const state = new URLSearchParams(location.search);
  const remember = () => {
    const query = state.toString();
    try {
      history.replaceState(null, "", (query ? `?${query}` : location.pathname) + location.hash);
    } catch { /* a page in a sandboxed frame cannot change its URL */ }
  };

  // Cells without a value stay last in both directions.
  const collator = new Intl.Collator("en", { numeric: true });
  const sort = (heading, direction) => {
    const table = heading.closest("table");
    const numeric = heading.dataset.kind === "number";
    const value = (row) => {
      const cell = row.cells[heading.cellIndex];
      const text = cell.dataset.value ?? cell.textContent.trim();
      if (text === "" || text === "–") return null;
      return numeric ? Number(text) : text;
    };
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = Array.from(table.tBodies[0].rows, (row) => [value(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (numeric ? a - b : collator.compare(a, b));
    });
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    const body = table.tBodies[0];
    body.remove(); // moving 2,000 rows one by one in the document takes seconds
    body.replaceChildren(...keyed.map(([, row]) => row));
    table.append(body);
  };
  document.addEventListener("click", (event) => {
    const heading = event.target.closest("th[data-key] button")?.closest("th");
    if (!heading) return;
    const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    sort(heading, direction);
    const table = heading.closest("table").id;
    const others = state.getAll("sort").filter((one) => one.split("~")[0] !== table);
    state.delete("sort");
    for (const one of [...others, [table, heading.dataset.key, direction].join("~")]) state.append("sort", one);
    remember();
  });
  for (const one of state.getAll("sort")) {
    const [table, key, direction] = one.split("~");
    const heading = document.querySelector(`#${CSS.escape(table)} th[data-key="${CSS.escape(key ?? "")}"]`);
    if (heading) sort(heading, direction === "descending" ? direction : "ascending");
  }

  // The rest of a long table is drawn on request.
  const more = new Map();
  const offer = (table, rows) => {
    const button = more.get(table);
    if (!button) return;
    button.hidden = rows <= drawn || table.tBodies[0].classList.contains("whole");
    button.textContent = `Show all ${number.format(rows)} rows`;
  };
  for (const table of document.querySelectorAll("table")) {
    const rows = table.tBodies[0].rows.length;
    if (rows <= drawn) continue;
    const button = Object.assign(document.createElement("button"), { type: "button", className: "more" });
    button.addEventListener("click", () => {
      table.tBodies[0].classList.add("whole");
      button.hidden = true;
    });
    table.parentNode.after(button);
    more.set(table, button);
    offer(table, rows);
  }

  // A row is shown if it has the selected method and setting and contains every word of the search.
  const form = document.querySelector("#leaderboard form");
  const blocks = Array.from(document.querySelectorAll("#leaderboard .setting"), (element) => ({
    element,
    setting: element.dataset.setting,
    tables: Array.from(element.querySelectorAll("table[data-filtered]"), (table) => ({
      table,
      frame: table.closest(".part"),
      counted: !table.id.startsWith("differences"),
      rows: Array.from(table.tBodies[0].rows, (row) => ({
        row,
        label: row.dataset.label,
        text: `${row.querySelector("th").textContent} ${element.dataset.setting}`.toLowerCase(),
      })),
    })),
  }));
  const filter = () => {
    const { find, setting, method } = Object.fromEntries(new FormData(form));
    const wanted = find.toLowerCase().split(/\s+/);
    let shown = 0;
    let all = 0;
    for (const block of blocks) {
      let inBlock = 0;
      for (const table of block.tables) {
        let inTable = 0;
        for (const { row, label, text } of table.rows) {
          const keep = (!setting || setting === block.setting) && (!method || method === label)
            && wanted.every((word) => text.includes(word));
          if (row.hidden === keep) row.hidden = !keep;
          inTable += keep;
        }
        table.frame.hidden = inTable === 0;
        offer(table.table, inTable);
        inBlock += inTable;
        if (table.counted) [shown, all] = [shown + inTable, all + table.rows.length];
      }
      block.element.hidden = inBlock === 0;
    }
    form.querySelector(".found").textContent = `${number.format(shown)} of ${number.format(all)} rows match`;
  };
  const changed = () => {
    for (const [name, value] of new FormData(form)) {
      if (value) state.set(name, value);
      else state.delete(name);
    }
    filter();
    remember();
  };
  for (const field of form.elements) {
    if (field.name && state.has(field.name)) field.value = state.get(field.name);
  }
  form.addEventListener("input", changed);
  form.addEventListener("reset", () => setTimeout(changed));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
})();
