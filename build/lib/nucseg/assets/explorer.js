(id, data) => {
  const root = document.getElementById(id);
  const sliders = [...root.querySelectorAll("input[type=range]")];
  const put = (element, value) => {
    if (element.localName === "path") element.setAttribute("d", value);
    else if (element.localName === "img") element.src = value;
    else if (element.getAttribute("role") === "img") element.setAttribute("aria-label", value);
    else element.textContent = value;
  };
  const draw = () => {
    let state = data.states;
    sliders.forEach((slider, i) => {
      const text = data.steps[i][slider.value];
      slider.setAttribute("aria-valuetext", text);
      slider.previousElementSibling.textContent = text;
      state = state[slider.value];
    });
    data.names.forEach((name, i) => {
      const value = data.values[state[i]];
      root.querySelectorAll(`[data-show="${name}"]`).forEach((element) => put(element, value));
    });
  };
  // JupyterLab would take the arrow keys for moves from cell to cell
  sliders.forEach((slider) => slider.setAttribute("data-lm-suppress-shortcuts", ""));
  root.addEventListener("input", draw);
  draw();
}
