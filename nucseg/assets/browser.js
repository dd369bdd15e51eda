(id, data) => {
  const root = document.getElementById(id);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const [image, tissue, sort, order] = ["image", "tissue", "sort", "order"].map(part);
  const [threshold, ridge, area, opacity, zoom] = ["threshold", "ridge", "area", "opacity", "zoom"].map(part);
  const kinds = Object.values(data.views).flat();
  const stages = () => [...root.querySelectorAll(".stage")];
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
  const frameOf = (sample) => sample.frames[sample.steps[threshold.value][ridge.value][area.value]];

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
    const views = view === data.both ? data.sides : [view]; // one for each stage
    const lines = { ...frame, truth: sample.truth, prediction: [...frame.found, ...frame.spurious, ...frame.merged] };
    const values = { name: sample.name };
    values.threshold = data.thresholds[threshold.value];
    values.ridge = data.ridges[ridge.value];
    values.area = data.areas[area.value];
    for (const key of Object.keys(data.scores)) values[key] = frame[key].toFixed(2);
    for (const kind of kinds) {
      const entry = root.querySelector(`.legend .${kind}`);
      entry.hidden = !views.some((one) => data.views[one].includes(kind));
      entry.querySelector("b").textContent = values[kind] = lines[kind].length;
    }
    root.dataset.view = view;
    while (stages().length > views.length) stages().pop().remove();
    while (stages().length < views.length) stages()[0].after(stages()[0].cloneNode(true));
    stages().forEach((stage, i) => {
      for (const kind of kinds) {
        const path = data.views[views[i]].includes(kind) ? lines[kind].map((k) => sample.lines[k]).join("") : "";
        stage.querySelectorAll(`.${kind} path`).forEach((element) => element.setAttribute("d", path));
      }
      stage.querySelector("svg").setAttribute("viewBox", sample.box);
      stage.style.aspectRatio = sample.box.split(" ").slice(2).join(" / ");
      const picture = stage.querySelector("img");
      if (picture.src !== sample.image) picture.src = sample.image;
      picture.alt = fill(data.alt[views[i]], values);
    });
    say("threshold", String(values.threshold));
    say("ridge", String(values.ridge));
    say("area", `${values.area} px`);
    data.output.forEach((text, i) => (root.querySelectorAll("output span")[i].textContent = fill(text, values)));
  };

  const step = (by) => {
    const count = image.options.length;
    image.selectedIndex = (image.selectedIndex + by + count) % count;
    draw();
  };

  const fade = () => {
    root.style.setProperty("--overlay", opacity.value / 100);
    say("opacity", `${opacity.value}%`);
  };

  const magnify = () => {
    const centres = stages().map((s) => [
      (s.scrollLeft + s.clientWidth / 2) / s.scrollWidth,
      (s.scrollTop + s.clientHeight / 2) / s.scrollHeight,
    ]);
    root.style.setProperty("--zoom", zoom.value);
    root.toggleAttribute("data-zoomed", zoom.value > 1);
    say("zoom", `${zoom.value} ×`);
    stages().forEach((stage, i) => {
      stage.tabIndex = zoom.value > 1 ? 0 : -1; // the arrow keys move a magnified image
      stage.scrollLeft = centres[i][0] * stage.scrollWidth - stage.clientWidth / 2;
      stage.scrollTop = centres[i][1] * stage.scrollHeight - stage.clientHeight / 2;
    });
  };

  const follow = (event) => {
    for (const stage of stages()) {
      if (stage === event.target || !event.target.matches(".stage")) continue;
      stage.scrollLeft = event.target.scrollLeft;
      stage.scrollTop = event.target.scrollTop;
    }
  };

  // JupyterLab would take the arrow keys for moves from cell to cell
  const controls = root.querySelectorAll("input, select, button, .stage");
  controls.forEach((control) => control.setAttribute("data-lm-suppress-shortcuts", ""));
  opacity.addEventListener("input", fade);
  zoom.addEventListener("input", magnify);
  part("previous").addEventListener("click", () => step(-1));
  part("next").addEventListener("click", () => step(1));
  for (const control of [tissue, sort, order, threshold, ridge, area]) control.addEventListener("input", list);
  root.addEventListener("input", (event) => event.target !== opacity && event.target !== zoom && draw());
  root.addEventListener("scroll", follow, true); // scrolling does not bubble
  list();
  draw();
  fade();
  magnify();
}
