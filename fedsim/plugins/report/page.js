"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const printing = window.matchMedia("print");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 680;
  const NARROW = 480;
  const shown = new Map();

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  };

  const themed = (figure, box) => {
    const colour = theme();
    const layout = structuredClone(figure.layout);
    const axis = {
      gridcolor: colour("rule"), linecolor: colour("rule"),
      zerolinecolor: colour("rule"), tickcolor: colour("rule"),
    };
    for (const name of ["xaxis", "yaxis"]) Object.assign(layout[name], axis);
    const narrow = box.clientWidth < NARROW;
    return Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: figure.matrix ? colour("empty") : "rgba(0,0,0,0)",
      font: { color: colour("ink"), size: narrow ? 11 : 12, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("rule"), font: { color: colour("ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("rule"), activecolor: colour("link") },
      height: figure.height,
      width: box.clientWidth,
      autosize: false,
    });
  };

  // On a phone the width is for the figure.
  const above = (colorbar) => ({
    orientation: "h", x: 0.5, y: 1, yanchor: "bottom", len: 1,
    title: Object.assign({}, colorbar.title, { side: "top" }),
  });

  const draw = (figure, width) => {
    const box = document.getElementById(`plot-${figure.key}`);
    const view = figure.views[shown.get(figure.key)];
    const layout = themed(figure, box);
    if (width) layout.width = width;
    const colour = theme();
    const data = view.data.map((trace) => {
      const copy = Object.assign({}, trace);
      if (copy.colorbar) {
        const place = layout.width < NARROW ? above(copy.colorbar) : {};
        copy.colorbar = Object.assign(
          {}, copy.colorbar, { thickness: 12, outlinewidth: 0, tickcolor: colour("rule") }, place,
        );
      }
      return copy;
    });
    const options = {
      displaylogo: false,
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: { filename: figure.key },
    };
    return Plotly.react(box, data, layout, options);
  };

  const drawAll = (width) => Promise.all(figures.map((figure) => draw(figure, width)));

  const addViews = (figure) => {
    const place = document.getElementById(`views-${figure.key}`);
    const select = document.createElement("select");
    const slider = document.createElement("input");
    select.setAttribute("aria-label", "what is shown");
    slider.setAttribute("aria-label", "what is shown");
    slider.type = "range";
    slider.min = 0;
    slider.max = figure.views.length - 1;
    figure.views.forEach((view, number) => {
      const option = document.createElement("option");
      option.value = number;
      option.textContent = view.name;
      select.append(option);
    });
    const show = (number) => {
      shown.set(figure.key, number);
      select.value = number;
      slider.value = number;
      draw(figure);
    };
    select.addEventListener("change", () => show(Number(select.value)));
    slider.addEventListener("input", () => show(Number(slider.value)));
    place.append(select, slider);
    select.value = slider.value = shown.get(figure.key);
  };

  for (const figure of figures) {
    shown.set(figure.key, figure.views.length - 1);
    if (figure.views.length > 1) addViews(figure);
  }
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    // Scrolling a phone changes the height alone.
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    drawAll();
  });
  dark.addEventListener("change", () => drawAll());
  printing.addEventListener("change", (event) => drawAll(event.matches ? PRINT_WIDTH : 0));
  window.addEventListener("beforeprint", () => drawAll(PRINT_WIDTH));
  window.addEventListener("afterprint", () => drawAll());
  drawAll().then(() => { document.body.dataset.drawn = figures.length; });
})();
