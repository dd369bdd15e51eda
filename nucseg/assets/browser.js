(id, data) => {
  const root = document.getElementById(id);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const [image, tissue, sort, order] = ["image", "tissue", "sort", "order"].map(part);
  const [threshold, area, opacity] = ["threshold", "area", "opacity"].map(part);
  const kinds = Object.values(data.views).flat();
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
  const frameOf = (sample) => sample.frames[sample.steps[threshold.value][area.value]];

  const list = () => {
    const key = sort.value;
    const up = order.value === "ascending" ? 1 : -1;
    const shown = [...data.samples.keys()].filter((i) => !tissue.value || data.samples[i].tissue === tissue.value);
    const rank = (i) => (key === "name" ? i : frameOf(data.samples[i])[key]); // samples come in order of name
    shown.sort((a, b) => up * (rank(a) - rank(b)) || a - b);
    const score = key === "name" ? "pq" : key;
    const chosen = image.value;
    image.replaceChildren(...shown.map((i) => {
      const sample = data.samples[i];
      return new Option(`${sample.name} — ${data.scores[score]} ${frameOf(sample)[score].toFixed(2)}`, i);
    }));
    image.value = shown.includes(Number(chosen)) ? chosen : shown[0];
  };

  const say = (name, text) => {
    part(name).setAttribute("aria-valuetext", text);
    part(`${name}-value`).textContent = text;
  };

  const draw = () => {
    const sample = data.samples[image.value];
    const frame = frameOf(sample);
    const view = root.querySelector("input[type=radio]:checked").value;
    const lines = { ...frame, truth: sample.truth, prediction: [...frame.found, ...frame.spurious, ...frame.merged] };
    const stage = root.querySelector(".stage");
    const values = { name: sample.name, threshold: data.thresholds[threshold.value], area: data.areas[area.value] };
    for (const kind of kinds) {
      const shown = data.views[view].includes(kind);
      const path = shown ? lines[kind].map((i) => sample.lines[i]).join("") : "";
      stage.querySelectorAll(`.${kind} path`).forEach((element) => element.setAttribute("d", path));
      const entry = root.querySelector(`.legend .${kind}`);
      entry.hidden = !shown;
      entry.querySelector("b").textContent = values[kind] = lines[kind].length;
    }
    for (const key of Object.keys(data.scores)) values[key] = frame[key].toFixed(2);
    stage.querySelector("svg").setAttribute("viewBox", sample.box);
    const picture = stage.querySelector("img");
    if (picture.src !== sample.image) picture.src = sample.image;
    picture.alt = fill(data.alt[view], values);
    say("threshold", String(values.threshold));
    say("area", `${values.area} px`);
    data.output.forEach((text, i) => (root.querySelectorAll("output span")[i].textContent = fill(text, values)));
  };

  const fade = () => {
    root.style.setProperty("--overlay", opacity.value / 100);
    say("opacity", `${opacity.value} %`);
  };

  // JupyterLab would take the arrow keys for moves from cell to cell
  root.querySelectorAll("input, select").forEach((control) => control.setAttribute("data-lm-suppress-shortcuts", ""));
  opacity.addEventListener("input", fade);
  for (const control of [tissue, sort, order, threshold, area]) control.addEventListener("input", list);
  root.addEventListener("input", (event) => event.target !== opacity && draw());
  list();
  draw();
  fade();
}
