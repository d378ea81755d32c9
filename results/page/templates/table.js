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
  window.pageState = {
    set: (name, value) => {
      if (value) state.set(name, value);
      else state.delete(name);
      remember();
    },
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
  const opposite = { ascending: "descending", descending: "ascending" };
  document.addEventListener("click", (event) => {
    const heading = event.target.closest("th[data-key] button")?.closest("th");
    if (!heading) return;
    // The first click shows the best first.
    const direction = opposite[heading.getAttribute("aria-sort")] ?? heading.dataset.first ?? "ascending";
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

  // A row is shown if its name and setting contain every word of the search.
  const form = document.querySelector("#leaderboard form");
  const tables = Array.from(document.querySelectorAll("table[data-filtered]"), (table) => {
    const block = table.closest(".setting");
    const setting = block?.dataset.setting ?? "";
    return {
      table, block,
      overview: table.id === "overview",
      rows: Array.from(table.tBodies[0].rows, (row) => ({
        row, text: `${row.querySelector("th").textContent} ${setting}`.toLowerCase(),
      })),
    };
  });
  const filter = () => {
    const wanted = form.elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let all = 0;
    for (const { table, block, overview, rows } of tables) {
      let inTable = 0;
      for (const { row, text } of rows) {
        const keep = wanted.every((word) => text.includes(word));
        if (row.hidden === keep) row.hidden = !keep;
        inTable += keep;
      }
      offer(table, inTable);
      if (block) block.hidden = inTable === 0;
      if (!overview) [shown, all] = [shown + inTable, all + rows.length];
    }
    if (wanted.length && shown < all) for (const { block } of tables) if (block && !block.hidden) block.open = true;
    form.querySelector(".found").textContent =
      shown < all ? `${number.format(shown)} of ${number.format(all)} rows match` : `${number.format(all)} rows`;
  };
  const changed = (event) => {
    if (event.target.name === "column") return;
    for (const [name, value] of new FormData(form)) {
      if (name === "column") continue;
      if (value) state.set(name, value);
      else state.delete(name);
    }
    filter();
    remember();
  };
  for (const field of form.elements) {
    if (field.name && field.name !== "column" && state.has(field.name)) field.value = state.get(field.name);
  }
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();

  // A menu closes when something else is clicked, or by Escape.
  const menus = [...document.querySelectorAll("details.menu")];
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (menu.open && !menu.contains(event.target)) menu.open = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const menu of menus.filter((one) => one.open)) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });
})();
