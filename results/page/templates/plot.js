// Quality against cost: choose the axes, point at a row to read it, click it to see its trials.
(() => {
  const place = document.getElementById("plot");
  if (!place || !window.Plot) return;
  const data = window.pageData;
  const form = document.querySelector("form.axes");
  const [setting, xs, ys, logx, logy] = ["setting", "x", "y", "logx", "logy"].map((name) => form.elements[name]);
  const few = 16; // rows that are named beside their points
  const farApart = 5; // ratio from which a scale is logarithmic at first
  const symbols = { o: "circle", s: "square", D: "diamond", "^": "triangle", v: "wye", P: "cross", X: "times", "*": "star" };
  const text = (value) => (value >= 1e9 ? `${+(value / 1e9).toPrecision(3)}G` : value >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M`
    : value >= 1e3 ? `${+(value / 1e3).toPrecision(3)}k` : `${+value.toPrecision(3)}`);
  const mebi = 2 ** 20;
  const cost = (key, value) => (bytes.has(key) ? `${text(value / mebi)} MiB` : seconds.has(key) ? `${text(value)} s` : text(value));
  const bytes = new Set(["memory", "peak", "weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes"]);
  const seconds = new Set(["train_time", "wall_time"]);
  const unit = (key) => (bytes.has(key) ? " (MiB)" : seconds.has(key) ? " (s)" : "");

  for (const metric of data.metrics) ys.add(new Option(metric.title, metric.key));
  for (const one of data.costs) xs.add(new Option(one.title, one.key));

  const points = () => data.rows.flatMap((row) => {
    const [mean, low, high] = row.scores[ys.value] ?? [];
    const own = row.costs[xs.value];
    if (mean === undefined || own === undefined || (setting && row.setting !== setting.value)) return [];
    const scale = bytes.has(xs.value) ? mebi : 1;
    return [{ row, x: own / scale, y: mean, low, high }];
  });
  const spread = (values) => (Math.min(...values) > 0 ? Math.max(...values) / Math.min(...values) : 0);
  const fit = () => {
    const found = points();
    const metric = data.metrics.find((one) => one.key === ys.value);
    const cut = outliers(found, metric.higher);
    for (const [box, values, wanted] of [[logx, found.map((p) => p.x), true], [logy, found.filter((p) => !cut.has(p)).map((p) => p.y), !metric.higher]]) {
      box.disabled = !found.length || spread(values) === 0;
      box.checked = wanted && spread(values) > farApart;
    }
  };

  // Far worse than the others: without them the others could not be told apart, so they stand at the frame with their value.
  const outliers = (found, higher) => {
    const cut = new Set();
    const badness = (p) => (higher ? -p.y : p.y > 0 ? Math.log(p.y) : p.y);
    const sorted = [...found].sort((a, b) => badness(b) - badness(a));
    for (let n = 0; n < sorted.length / 4 && sorted.length - n > 3; n++) {
      const [worst, next, best] = [sorted[n], sorted[n + 1], sorted.at(-1)].map(badness);
      if (worst - next <= 1.5 * (next - best)) break;
      for (const one of sorted.slice(0, n + 1)) cut.add(one);
    }
    return cut;
  };
  // Limits that show all means, and as much of the intervals as keeps the means apart.
  const limits = (found, log) => {
    const means = found.map((p) => (log ? Math.log(p.y) : p.y));
    const [least, most] = [Math.min(...means), Math.max(...means)];
    const room = (most - least) || Math.abs(most) * 0.1 || 1;
    const known = (values) => values.filter((v) => Number.isFinite(v) && (!log || v > 0)).map((v) => (log ? Math.log(v) : v));
    const low = Math.max(Math.min(least, ...known(found.map((p) => p.low ?? NaN))), least - 0.5 * room) - 0.06 * room;
    const high = Math.min(Math.max(most, ...known(found.map((p) => p.high ?? NaN))), most + 0.5 * room) + 0.06 * room;
    return log ? [Math.exp(low), Math.exp(high)] : [low, high];
  };
  const padded = (values, log) => {
    const own = values.map((v) => (log ? Math.log(v) : v));
    const [low, high] = [Math.min(...own), Math.max(...own)];
    const room = 0.07 * ((high - low) || Math.abs(high) || 1);
    return log ? [Math.exp(low - room), Math.exp(high + room)] : [low - room, high + room];
  };
  const front = (found, higher) => {
    const best = [];
    for (const p of [...found].sort((a, b) => a.x - b.x || (higher ? b.y - a.y : a.y - b.y))) {
      if (p.row.apart.length) continue;
      if (!best.length || (higher ? p.y > best.at(-1).y : p.y < best.at(-1).y)) best.push(p);
    }
    return best;
  };

  // Names beside their points, each where it covers no point and no other name; without room only the tip has it.
  const labelled = (named, found, name, at, box) => {
    const taken = found.map((p) => { const [x, y] = at(p); return [x - 7, y - 7, x + 7, y + 7]; });
    const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    return named.flatMap((p) => {
      const [x, y] = at(p);
      const width = 6.3 * name(p).length + 4;
      for (const [dx, dy, anchor] of [[10, 0, "start"], [-10, 0, "end"], [0, -14, "middle"], [0, 14, "middle"],
        [9, -12, "start"], [9, 12, "start"], [-9, -12, "end"], [-9, 12, "end"]]) {
        const left = x + dx - (anchor === "end" ? width : anchor === "middle" ? width / 2 : 0);
        const own = [left, y + dy - 7, left + width, y + dy + 7];
        if (own[0] < box[0] || own[2] > box[2] || own[1] < box[1] || own[3] > box[3] || taken.some((one) => meets(one, own))) continue;
        taken.push(own);
        return [{ p, dx, dy, anchor }];
      }
      return [];
    });
  };

  const words = (p) => {
    const metric = data.metrics.find((one) => one.key === ys.value);
    const title = data.costs.find((one) => one.key === xs.value).title;
    const bounds = p.low === null || p.low === undefined ? "" : ` [${text(p.low)}, ${text(p.high)}]`;
    const scale = bytes.has(xs.value) ? mebi : 1;
    const rank = p.row.rank ? `rank ${p.row.rank}` : "not ranked";
    return `${p.row.name} (${rank})\n${metric.title} ${text(p.y)}${bounds}\n${title} ${cost(xs.value, p.x * scale)}`;
  };

  const draw = () => {
    const found = points();
    const metric = data.metrics.find((one) => one.key === ys.value);
    if (!found.length) {
      place.textContent = "No row has both of these.";
      return;
    }
    const width = Math.max(280, place.clientWidth);
    const height = Math.max(260, Math.min(420, place.dataset.height || 0.72 * width));
    const cut = outliers(found, metric.higher);
    const kept = found.filter((p) => !cut.has(p));
    const best = front(kept, metric.higher);
    const symbol = (p) => symbols[p.row.marker] ?? "circle";
    const domain = limits(kept, logy.checked);
    const edge = domain[metric.higher ? 0 : 1]; // where what is cut stands
    for (const p of found) p.at = cut.has(p) ? edge : p.y;
    const intervals = kept.filter((p) => p.low !== null && p.low !== undefined);
    const y = { type: logy.checked ? "log" : "linear", domain, clamp: true, ticks: 6, tickFormat: logy.checked ? "~g" : undefined,
      label: `${metric.title}: ${metric.higher ? "higher" : "lower"} is better`, labelAnchor: "center", labelArrow: "none", grid: true };
    const x = { type: logx.checked ? "log" : "linear", domain: padded(found.map((p) => p.x), logx.checked), ticks: Math.max(3, Math.floor(width / 90)),
      tickFormat: (v) => text(v), label: `${data.costs.find((one) => one.key === xs.value).title}${unit(xs.value)}: lower is better`, labelAnchor: "center", labelArrow: "none" };
    const base = { width, height, marginLeft: 58, marginBottom: 42, marginTop: 12, marginRight: 14, style: { background: "none", fontSize: "12px" }, x, y };
    const line = best.flatMap((p, i) => (i ? [{ x: p.x, y: best[i - 1].y }, p] : [p])).map(({ x, y }) => ({ x, y }));
    line.push({ x: x.domain[1], y: best.at(-1)?.y });
    const marks = [
      Plot.line(best.length ? line : [], { x: "x", y: "y", stroke: "currentColor", strokeOpacity: 0.45 }),
      Plot.ruleX(intervals, { x: "x", y1: "low", y2: "high", stroke: (p) => p.row.colour, strokeOpacity: 0.5, strokeWidth: 1.5 }),
      Plot.dot(found, { x: "x", y: "at", r: 5, symbol: { value: symbol }, stroke: (p) => p.row.colour, strokeWidth: 1.7,
        fill: (p) => (p.row.hollow || p.row.apart.length ? "var(--card)" : p.row.colour),
        ariaLabel: words, href: (p) => `#trial-${p.row.id}`, className: "points" }),
    ];
    const name = (p) => (cut.has(p) ? `${p.row.name} ${text(p.y)} ${metric.higher ? "↓" : "↑"}` : p.row.name);
    const rankOf = (p) => (cut.has(p) ? -1 : best.includes(p) ? 0 : 1); // who is named first where there is little room
    const bare = Plot.plot({ ...base, marks: [marks[2]] });
    const [sx, sy] = [bare.scale("x"), bare.scale("y")];
    const named = found.length <= few ? found : [...best.slice(-few), ...cut]; // of many the front
    if (named.length) {
      const names = labelled([...named].sort((a, b) => rankOf(a) - rankOf(b)), found, name, (p) => [sx.apply(p.x), sy.apply(p.at)], [base.marginLeft, 0, width, height - base.marginBottom]);
      for (const { p, dx, dy, anchor } of names) {
        marks.push(Plot.text([p], { x: "x", y: "at", text: () => name(p), dx, dy, textAnchor: anchor, fill: "currentColor", pointerEvents: "none" }));
      }
    }
    marks.push(Plot.tip(found, Plot.pointer({ x: "x", y: "at", title: words, fill: "var(--card)", stroke: "var(--rule)", maxRadius: 30 })));
    const plot = Plot.plot({ ...base, symbol: { range: undefined, type: "identity" }, marks });
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `${metric.title} against ${data.costs.find((one) => one.key === xs.value).title}, a link for each row`);
    for (const link of plot.querySelectorAll("a")) {
      const point = link.querySelector("[aria-label]");
      link.setAttribute("aria-label", point.getAttribute("aria-label").replaceAll("\n", ", "));
      const xlink = "http://www.w3.org/1999/xlink"; // Plot's; selectors see only what has no namespace
      const href = link.getAttributeNS(xlink, "href");
      link.removeAttributeNS(xlink, "href");
      link.setAttribute("href", href);
      link.dataset.row = href.replace("#trial-", "");
      point.removeAttribute("aria-label");
    }
    // The keyboard reads a point as the pointer does.
    for (const link of plot.querySelectorAll("a")) {
      link.addEventListener("focus", () => {
        const box = link.getBoundingClientRect();
        const where = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, pointerType: "mouse", bubbles: true };
        plot.dispatchEvent(new PointerEvent("pointerenter", where));
        plot.dispatchEvent(new PointerEvent("pointermove", where));
      });
      link.addEventListener("blur", () => plot.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" })));
    }
    for (const group of plot.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label"); // not allowed without a role
    place.replaceChildren(plot);
  };

  for (const one of [setting, xs, ys]) one?.addEventListener("change", () => { fit(); draw(); });
  for (const one of [logx, logy]) one.addEventListener("change", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  // Plot would hold its tip where a point was pressed, although that opens the drawer.
  place.addEventListener("pointerdown", (event) => event.stopPropagation(), true);
  form.hidden = false;
  fit();
  setTimeout(draw); // the table first
  let drawnAt = place.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(place.clientWidth - drawnAt) < 4) return;
    drawnAt = place.clientWidth;
    draw();
  }).observe(place);
})();
