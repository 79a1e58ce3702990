"use strict";
// Draws the series over the static charts that are already in the page: synced cursors, zoom, a choice of axis.
(() => {
  const sections = JSON.parse(document.getElementById("series").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const written = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
  const short = (value) => (Math.abs(value) >= 1e6 ? written(value / 1e6) + "M" : Math.abs(value) >= 1e4 ? written(value / 1e3) + "k" : written(value));
  const drawn = [];

  // The means and 98 % of the single values set the axis: one wild step must not flatten every curve.
  function verticalRange(plot) {
    const [first, last] = plot.series[0].idxs || [0, plot.data[0].length - 1];
    const means = [], raw = [];
    plot.series.forEach((series, index) => {
      if (index === 0) return;
      plot.data[index].slice(first, last + 1).forEach((value) => {
        if (value != null) (series.faint ? raw : means).push(value);
      });
    });
    raw.sort((a, b) => a - b);
    const cut = Math.floor(raw.length / 100);
    const all = means.concat(raw.slice(cut, raw.length - cut));
    if (!all.length) return [0, 1];
    const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    const air = high > low ? 0.06 * (high - low) : 0.5;
    return [low - air, high + air];
  }

  function readout(place, lines) {
    return (plot) => {
      const at = plot.cursor.idx;
      place.textContent = "";
      if (at == null) return;
      const add = (text, colour) => {
        const span = document.createElement("span");
        span.textContent = text;
        if (colour) span.style.color = colour;
        place.append(span);
      };
      add(short(plot.data[0][at]));
      lines.forEach((line, index) => {
        if (line.raw) return;
        // Runs log at different tokens or seconds: the last value counts, but not beyond the run's end.
        const values = plot.data[index + 1];
        const value = values.slice(0, at + 1).findLast((other) => other != null);
        if (value != null && values.slice(at).some((other) => other != null)) add("● " + written(value), line.colour);
      });
    };
  }

  function linesOf(section, panel, state) {
    const lines = [];
    section.tracks.forEach((track) => {
      if (state.hidden.has(track.method) || !track.x[state.axis]) return;
      section.panels[panel].forEach((key, index) => {
        if (track.values[key]) {
          lines.push({ raw: track.raw, dashed: index > 0, colour: css("--c" + track.colour), table: [track.x[state.axis], track.values[key]] });
        }
      });
    });
    return lines.sort((a, b) => b.raw - a.raw);
  }

  // x must be a number and rise; a run that did not record it on every step is drawn where it did.
  const usable = ([x, y]) => {
    const kept = x.map((value, index) => index).filter((index) => x[index] != null);
    return [kept.map((index) => x[index]), kept.map((index) => y[index])];
  };

  function draw(element, kind, section, state) {
    const place = element.parentElement.querySelector(".readout");
    const lines = linesOf(section, Number(element.dataset.panel), state);
    place.textContent = "";
    if (!lines.length) return null;
    const axis = { stroke: css("--faint"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const plot = new uPlot({
      width: element.clientWidth, height: 200, legend: { show: false }, padding: [8, 12, 0, 0],
      cursor: { sync: { key: kind, scales: ["x", null] }, drag: { x: true, y: false }, points: { show: false } },
      scales: { x: { time: false }, y: { range: verticalRange } },
      axes: [{ ...axis, size: 26, gap: 2, values: (_, all) => all.map(short) }, { ...axis, size: 46, gap: 4, values: (_, all) => all.map(short) }],
      series: [{}, ...lines.map((line) => line.raw
        ? { faint: true, stroke: line.colour, alpha: 0.28, paths: () => null, points: { show: true, size: 3.4, width: 0, fill: line.colour } }
        : { stroke: line.colour, width: 2, dash: line.dashed ? [5, 4] : undefined, spanGaps: true, points: { show: false } })],
      hooks: { setCursor: [readout(place, lines)] },
    }, uPlot.join(lines.map((line) => usable(line.table))), element);
    element.classList.add("drawn");
    return plot;
  }

  document.querySelectorAll("[data-section]").forEach((part) => {
    const kind = part.dataset.section, section = sections[kind];
    const state = { axis: "step", hidden: new Set() };
    let plots = [];
    const redraw = () => {
      plots.forEach((plot) => plot.destroy());
      plots = [...part.querySelectorAll(".plot")].map((element) => draw(element, kind, section, state)).filter(Boolean);
    };
    part.classList.add("live");
    part.querySelectorAll(".scripted").forEach((element) => { element.hidden = false; });
    part.querySelectorAll(".toggle").forEach((button, method) => button.addEventListener("click", () => {
      const show = state.hidden.delete(method) || !state.hidden.add(method);
      button.setAttribute("aria-pressed", String(show));
      redraw();
    }));
    const axes = [...part.querySelectorAll("[data-axis]")];
    axes.forEach((button) => {
      button.hidden = !section.tracks.some((track) => track.x[button.dataset.axis]);
      button.addEventListener("click", () => {
        state.axis = button.dataset.axis;
        axes.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        redraw();
      });
    });
    redraw();
    drawn.push(redraw);
    new ResizeObserver(() => plots.forEach((plot) => {
      const width = plot.root.parentElement.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: 200 });
    })).observe(part);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((redraw) => redraw()));
})();
