// Attention heat maps: select method, layer, head and tokens; the map is drawn from #attention-data.
(() => {
  const data = JSON.parse(document.getElementById("attention-data").textContent);
  const section = document.getElementById("attention");
  const [method, layer, head] = ["method", "layer", "head"].map((name) => section.querySelector(`select[name=${name}]`));
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const colours = bytes(data.colours);
  const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;
  const range = (length) => Array.from({ length }, (_, number) => number);

  // Unpacked when first shown.
  const mapOf = (id) => {
    const map = data.methods[method.value].maps[id];
    if (map && typeof map.patches === "string") {
      map.patches = bytes(map.patches);
      map.scales = floats(map.scales);
      map.shares = floats(map.shares);
    }
    return map;
  };

  // Mean over the selected layers, heads and tokens: for every patch, and for the whole input.
  const mean = (map, tokens) => {
    const layers = layer.value === "" ? range(map.layers) : [Number(layer.value)];
    const heads = head.value === "" ? range(map.heads) : [Number(head.value)];
    const size = map.rows * map.columns, count = map.tokens.length;
    const patches = new Float64Array(size), chosen = layers.length * heads.length * tokens.length;
    let share = 0;
    for (const l of layers) for (const h of heads) for (const token of tokens) {
      const number = (l * map.heads + h) * count + token, scale = map.scales[number] / 255 / chosen;
      for (let p = 0; p < size; p++) patches[p] += scale * map.patches[number * size + p];
      share += map.shares[number] / chosen;
    }
    return { patches, share };
  };

  const paint = (canvas, map, patches, most) => {
    [canvas.width, canvas.height] = [map.columns, map.rows];
    const image = new ImageData(map.columns, map.rows);
    patches.forEach((value, p) => {
      const step = 4 * Math.round(most > 0 ? (255 * value) / most : 0);
      image.data.set(colours.subarray(step, step + 4), 4 * p);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.style.cssText = map.style;
  };

  const draw = (sample) => {
    const map = mapOf(sample.dataset.example);
    const pressed = [...sample.querySelectorAll(".tokens [aria-pressed=true]")].map((button) => Number(button.value));
    const canvas = sample.querySelector("canvas"), words = sample.querySelector(".sentence");
    canvas.hidden = !map || !map.tokens.length;
    if (canvas.hidden) {
      words.textContent = map ? "The caption is empty." : "Not recorded for this method.";
      return;
    }
    const tokens = pressed.length ? pressed : range(map.tokens.length);
    const { patches, share } = mean(map, tokens);
    const most = Math.max(...patches), best = patches.indexOf(most);
    paint(canvas, map, patches, most);
    const [row, column] = [Math.floor(best / map.columns) + 1, (best % map.columns) + 1];
    const where = map.rows > 1 ? `row ${row}, column ${column}` : `position ${column}`;
    words.textContent = `${percent(share)} of the attention goes to the ${sample.dataset.context}; ` +
      `the brightest patch (${where} of ${map.rows} × ${map.columns}) has ${percent(most)}.`;
    const span = pressed.length ? `“${pressed.map((token) => map.tokens[token].trim()).join(" ")}”` : "the whole caption";
    canvas.setAttribute("aria-label", `Heat map of ${span}: ${words.textContent}`);
  };

  const showTokens = (sample) => {
    const map = mapOf(sample.dataset.example);
    const buttons = (map ? map.tokens : []).map((token, number) => {
      const button = Object.assign(document.createElement("button"), { type: "button", value: number });
      button.textContent = token.trim() || "·";
      if (!token.trim()) button.setAttribute("aria-label", `token ${number + 1}, without visible text`);
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
        draw(sample);
      });
      return button;
    });
    sample.querySelector(".tokens").replaceChildren(...buttons);
  };

  const samples = [...section.querySelectorAll("[data-example]")];
  const options = (select, count, name) => {
    const all = new Option(`all ${count} summed`, "");
    select.replaceChildren(all, ...(count > 1 ? range(count).map((n) => new Option(`${name} ${n + 1}`, n)) : []));
    select.disabled = count < 2;
  };
  const showMethod = () => {
    const maps = Object.values(data.methods[method.value].maps);
    options(layer, maps.length ? maps[0].layers : 0, "layer");
    options(head, maps.length ? maps[0].heads : 0, "head");
    for (const sample of samples) { showTokens(sample); draw(sample); }
  };

  for (const sample of samples) {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    const still = sample.querySelector("img.heat");
    if (still) still.remove();
    sample.querySelector(".map").append(canvas);
  }
  method.addEventListener("change", showMethod);
  for (const select of [layer, head]) select.addEventListener("change", () => samples.forEach(draw));
  const strength = section.querySelector("input[name=strength]");
  strength.addEventListener("input", () => section.style.setProperty("--strength", strength.value));
  section.querySelector("button[name=whole]").addEventListener("click", () => {
    for (const button of section.querySelectorAll(".tokens [aria-pressed=true]")) button.setAttribute("aria-pressed", "false");
    samples.forEach(draw);
  });
  section.querySelector(".filters").hidden = false;
  section.querySelector(".static").remove();
  showMethod();
})();
