"use strict";
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const coarse = window.matchMedia("(pointer: coarse)").matches;

  // "--name" or "--name@opacity" -> the colour that the style sheet gives that name in the current theme.
  function colour(token) {
    const [name, opacity] = token.split("@");
    const hex = getComputedStyle(root).getPropertyValue(name).trim();
    if (opacity === undefined) return hex;
    const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${channels.join(",")},${opacity})`;
  }

  function themed(value) {
    if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)]));
    }
    return value;
  }

  // What the buttons have chosen: the group of traces that is shown, and the arms that are not.
  const group = {};
  const hidden = {};
  for (const id of Object.keys(specs)) {
    group[id] = "*";
    hidden[id] = new Set();
  }

  function draw(id) {
    const { data, layout } = themed(specs[id]);
    for (const trace of data) {
      const chosen = trace.meta === undefined || group[id] === "*" || trace.meta === group[id];
      trace.visible = chosen && !hidden[id].has(trace.legendgroup);
    }
    const family = getComputedStyle(document.body).fontFamily;
    layout.font = { ...layout.font, family };
    // On a touch screen a drag scrolls the page; elsewhere it zooms, and a double click goes back.
    layout.dragmode = coarse ? false : "zoom";
    const options = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
    return Plotly.react(`chart-${id}`, data, layout, options);
  }

  const drawAll = () => Promise.all(Object.keys(specs).map(draw));

  // "xaxis.range" = value, inside the stored figure, so that it survives a change of theme.
  function change(layout, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    keys.reduce((inner, key) => inner[key], layout)[last] = value;
  }

  function choose(button) {
    const id = button.dataset.chart;
    const value = JSON.parse(button.dataset.value);
    if (typeof value === "string") group[id] = value;
    else for (const [path, item] of Object.entries(value)) change(specs[id].layout, path, item);
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  }

  function toggle(button) {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(shown));
    for (const chart of button.closest("figure").querySelectorAll(".chart")) {
      if (shown) hidden[chart.dataset.spec].delete(button.dataset.arm);
      else hidden[chart.dataset.spec].add(button.dataset.arm);
      draw(chart.dataset.spec);
    }
  }

  for (const button of document.querySelectorAll(".switch button")) {
    if (button.getAttribute("aria-pressed") === "true") choose(button);
    button.addEventListener("click", () => {
      choose(button);
      draw(button.dataset.chart);
    });
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => toggle(button));
  }

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll().then(() => {
    root.dataset.drawn = "true";
  });
})();
