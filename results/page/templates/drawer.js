// A row's drawer: what it was trained with, its trials with links to their files, their curves, and what it wrote.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  window.pageData = data; // for the plot
  const rows = new Map(data.rows.map((row) => [row.id, row]));
  const drawer = document.getElementById("drawer");
  const part = (name) => drawer.querySelector(`[data-part=${name}]`);
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const shown = (value) => (value === null || value === undefined ? "–" : `${value}`);

  // The columns of the row as the table shows them; all of them, or those that are not hidden.
  const numbers = (id, shownOnly) => {
    const line = document.querySelector(`table.board tr[data-row="${CSS.escape(id)}"]`);
    if (!line) return [];
    const heads = line.closest("table").tHead.rows[0].cells;
    return [...line.cells].slice(2).flatMap((cell, index) => {
      const small = cell.querySelector("small");
      const text = cell.firstChild?.textContent.trim() ?? "";
      if (text === "" || text === "–" || (shownOnly && getComputedStyle(cell).display === "none")) return [];
      const value = make("dd", { textContent: text });
      if (cell.title) value.append(" ", make("small", { textContent: cell.title }));
      else if (small) value.append(" ", make("small", { textContent: small.textContent, className: small.className }));
      return [make("dt", { textContent: heads[index + 2].querySelector("button").textContent }), value];
    });
  };

  const links = (trial) => {
    const found = (trial.files ?? []).map((number) => {
      const [name, words] = data.files[number];
      return make("a", { href: `${trial.folder}/${name}`, textContent: words });
    });
    if (trial.mlflow && /^https?:/.test(data.mlflow)) {
      found.push(make("a", { href: `${data.mlflow}/#/runs/${trial.mlflow}`, textContent: "MLflow run" }));
    } else if (trial.mlflow) {
      found.push(make("span", { className: "id", title: `run id in ${data.mlflow}`, textContent: `MLflow ${trial.mlflow.slice(0, 8)}` }));
    }
    return found.flatMap((link, number) => (number ? [" · ", link] : [link]));
  };

  const trials = (row) => {
    const primary = data.metrics.find((metric) => metric.key === data.primary);
    const titles = ["Seed", primary.title, "Best epoch", "Status", "Files"];
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...titles.map((title, number) =>
      make("th", { scope: "col", textContent: title, className: number > 2 ? "left" : "" })))));
    table.append(make("tbody", {}, ...row.trials.map((trial) => make("tr", {},
      make("td", {}, `${trial.seed}`),
      make("td", { textContent: shown(trial.score) }),
      make("td", { textContent: shown(trial.epoch) }),
      make("td", { className: "left", textContent: trial.status }),
      make("td", { className: "left wrap" }, ...links(trial))))));
    return [make("h3", { textContent: "Trials" }), make("div", { className: "scroll", tabIndex: 0 }, table)];
  };

  const curve = (row) => {
    const points = row.trials.flatMap((trial) =>
      (trial.curve ?? []).map(([epoch, perplexity]) => ({ epoch, perplexity, seed: `${trial.seed}` })));
    if (!points.length || !window.Plot) return [];
    const most = Math.max(...points.map((point) => point.epoch));
    const plot = Plot.plot({
      width: Math.min(520, drawer.clientWidth - 48), height: 220, marginLeft: 52, style: { background: "none" },
      x: { label: "epoch", ticks: d3.range(1, most + 1, Math.ceil(most / 10)), tickFormat: "d" },
      y: { label: "validation perplexity (log)", type: "log", ticks: 5, tickFormat: "~g", grid: true },
      marks: [
        Plot.line(points, { x: "epoch", y: "perplexity", z: "seed", stroke: row.colour, strokeOpacity: 0.8 }),
        Plot.dot(points, { x: "epoch", y: "perplexity", fill: row.colour, r: 2.5 }),
        Plot.tip(points, Plot.pointer({ x: "epoch", y: "perplexity", title: (d) => `seed ${d.seed}, epoch ${d.epoch}: ${d.perplexity}` })),
      ],
    });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Validation perplexity by epoch of ${row.name}, a line for each seed`);
    for (const group of plot.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label"); // not allowed without a role
    return [make("h3", { textContent: "Curve" }), plot];
  };

  const samples = (row) => {
    const found = data.samples.filter((sample) => row.id in sample.outputs);
    if (!found.length) return [];
    const items = found.slice(0, 4).map((sample) => {
      const picture = document.querySelector(`.sample[data-example="${CSS.escape(sample.id)}"] img`);
      const item = make("div", { className: "said" });
      if (picture) item.append(picture.cloneNode());
      item.append(make("p", {}, make("strong", { textContent: sample.outputs[row.id] || "(nothing)" }), make("br"),
        make("small", { className: "soft", textContent: `reference: ${sample.reference}` })));
      return item;
    });
    return [make("h3", { textContent: "What it writes" }), ...items];
  };

  const show = (id) => {
    const row = rows.get(id);
    if (!row) return false;
    drawer.querySelector("h2").textContent = row.name;
    part("where").textContent = [row.setting, row.rank && `rank ${row.rank}`].filter(Boolean).join(" · ");
    part("notes").replaceChildren(...[...row.apart.map((reason) => `Not ranked: ${reason}`), ...row.notes]
      .map((text) => make("p", { className: "small", textContent: text })));
    part("numbers").replaceChildren(make("dl", {}, ...numbers(id, true)));
    part("all").replaceChildren(make("dl", {}, ...numbers(id, false),
      ...Object.entries(row.options).flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: shown(value) })])));
    part("trials").replaceChildren(...trials(row));
    if (!drawer.open) drawer.showModal();
    part("curve").replaceChildren(...curve(row));
    part("samples").replaceChildren(...samples(row));
    drawer.scrollTop = 0;
    return true;
  };
  window.showRow = show;

  document.addEventListener("click", (event) => {
    if (event.target === drawer) drawer.close(); // beside it
    const place = event.target.closest("[data-row]");
    if (!place || drawer.contains(place) || getSelection().toString()) return;
    if (event.target.closest("a, button, summary") && !event.target.closest("a[href^='#trial-']")) return;
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (show(place.dataset.row)) event.preventDefault();
  });
})();
