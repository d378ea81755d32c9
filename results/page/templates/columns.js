// The columns of the leaderboard that are shown, remembered in the URL; and the table as shown, as a CSV file.
(() => {
  const style = document.getElementById("columns");
  const boxes = [...document.querySelectorAll("input[name=column]")];
  const initial = boxes.filter((box) => box.checked).map((box) => box.value).join("~");
  const show = () => {
    const hidden = boxes.filter((box) => !box.checked).map((box) => `.c-${box.value}`);
    style.textContent = hidden.length ? `${hidden.join(", ")} { display: none; }` : "";
  };
  const state = new URLSearchParams(location.search);
  if (state.has("columns")) {
    const wanted = new Set(state.get("columns").split("~"));
    for (const box of boxes) box.checked = wanted.has(box.value);
  }
  show();
  for (const box of boxes) {
    box.addEventListener("change", () => {
      show();
      const chosen = boxes.filter((one) => one.checked).map((one) => one.value).join("~");
      window.pageState.set("columns", chosen === initial ? "" : chosen);
    });
  }

  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const own = (cell) => (cell.querySelector("button, a") ?? cell).firstChild?.textContent.trim() ?? "";
  const values = (row) => [...row.cells].filter((cell) => getComputedStyle(cell).display !== "none")
    .map((cell) => quoted(cell.dataset.value ?? own(cell)));
  const button = document.querySelector(".as-shown");
  button.hidden = false;
  button.addEventListener("click", () => {
    const lines = [];
    for (const table of document.querySelectorAll("table.board")) {
      if (lines.length && !table.checkVisibility()) continue;
      lines.push(values(table.tHead.rows[0]).join(","));
      for (const row of table.tBodies[0].rows) if (!row.hidden) lines.push(values(row).join(","));
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
    link.download = "leaderboard-as-shown.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
