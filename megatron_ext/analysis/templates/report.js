"use strict";
// Draws the panels of the report from the JSON in the page. The root element says how it went: data-ready or data-error.
// Ours, not uPlot (51 KB): that draws on a canvas, without keyboard, themes or text to test, and takes over a quarter of this.
(() => {
  const root = document.documentElement;
  const fail = (message) => {
    root.dataset.error = String(message);
    const problem = document.getElementById("problem");
    problem.textContent = "The curves could not be drawn: " + message;
    problem.hidden = false;
  };
  window.addEventListener("error", (event) => fail(event.message));

  const data = JSON.parse(document.getElementById("data").textContent);
  const COLORS = 7;
  const DASHES = ["", "7 4", "2 4", "9 4 2 4"];
  const hidden = new Set();
  let faded = null; // The group that the legend points at: the others step back.

  const color = (group) => `var(--c${group % COLORS})`;
  const dash = (group) => DASHES[Math.floor(group / COLORS) % DASHES.length];
  const visible = (run) => !hidden.has(data.runs[run].group);

  function element(name, attributes = {}, parent = null, text = null) {
    const svg = ["svg", "g", "path", "line", "text", "circle"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    if (parent !== null) parent.append(made);
    return made;
  }

  // Numbers -----------------------------------------------------------------------------------------------------------

  function trimmed(value, digits) {
    return String(Number(value.toFixed(digits)));
  }

  function counted(value, digits = 3) {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
      if (Math.abs(value) >= size) return trimmed(value / size, digits) + unit;
    }
    return trimmed(value, digits);
  }

  function timed(seconds) {
    if (seconds < 60) return trimmed(seconds, 1) + " s";
    const whole = Math.round(seconds);
    const two = (value) => String(value).padStart(2, "0");
    const hours = Math.floor(whole / 3600);
    const minutes = Math.floor(whole / 60) % 60;
    return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
  }

  function plain(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 10000) return counted(value, 2);
    if (size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−");
    return String(Number(value.toPrecision(5)));
  }

  const shownX = (panel, value) => (panel.x === "seconds" ? timed(value) : counted(value));

  // Axes --------------------------------------------------------------------------------------------------------------

  function niceStep(span, count, steps = [1, 2, 2.5, 5, 10]) {
    const rough = span / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    return power * steps.find((step) => step * power >= rough * (1 - 1e-9));
  }

  function timeStep(span, count) {
    const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
    const rough = span / Math.max(1, count);
    if (rough < 1) return niceStep(span, count);
    return steps.find((step) => step >= rough) ?? 86400 * Math.ceil(rough / 86400);
  }

  function multiples(low, high, step) {
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
    return found;
  }

  function logTicks(low, high, most) {
    const found = (factors) => {
      const list = [];
      for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.ceil(Math.log10(high)); e += 1) {
        for (const f of factors) {
          const value = Number(`${f}e${e}`);
          if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) list.push(value);
        }
      }
      return list;
    };
    for (const factors of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
      const list = found(factors);
      if (list.length <= most && list.length >= 2) return list;
    }
    const decades = found([1]);
    if (decades.length < 2) return multiples(low, high, niceStep(high - low, Math.min(4, most)));
    return decades.filter((_, index) => index % Math.ceil(decades.length / most) === 0);
  }

  function extent(panel, runs) {
    let [x0, x1, y0, y1] = [0, 0, Infinity, -Infinity];
    for (const run of runs) {
      const s = panel.series[run];
      for (const x of s.x) x1 = Math.max(x1, x);
      for (const x of s.broken ?? []) x1 = Math.max(x1, x);
      for (const y of s.y) [y0, y1] = [Math.min(y0, y), Math.max(y1, y)];
    }
    if (y0 > y1) return null;
    if (x1 <= x0) x1 = x0 + 1;
    return { x0, x1, y0, y1 };
  }

  // A logarithmic axis where a linear one would press most of the curve flat.
  function vertical(panel, range) {
    let { y0, y1 } = range;
    if (panel.thresholds) [y0, y1] = [Math.min(y0, 1), Math.max(y1, 1.25)];
    if (panel.zero) return { log: false, y0: 0, y1: y1 > 0 ? y1 * 1.06 : 1 };
    if (y0 > 0 && y1 / y0 > (panel.thresholds ? 5 : 12)) {
      const margin = (y1 / y0) ** 0.04;
      return { log: true, y0: y0 / margin, y1: y1 * margin };
    }
    const margin = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
    return { log: false, y0: y0 >= 0 ? Math.max(0, y0 - margin) : y0 - margin, y1: y1 + margin };
  }

  // A panel -----------------------------------------------------------------------------------------------------------

  const pen = document.createElement("canvas").getContext("2d");
  function textWidth(text) {
    pen.font = "12px " + getComputedStyle(document.body).fontFamily;
    return pen.measureText(text).width;
  }

  class Panel {
    constructor(panel, parent) {
      this.panel = panel;
      this.figure = element("figure", {}, parent);
      const caption = element("figcaption", {}, this.figure, panel.title);
      element("span", {}, caption, panel.unit);
      this.svg = element("svg", { tabindex: "0", role: "img" }, this.figure);
      this.svg.setAttribute("aria-label", `${panel.title}, ${panel.unit}. Arrow keys read values off.`);
      this.readout = element("div", { class: "readout", hidden: "" }, this.figure);
      this.at = null;
      this.svg.addEventListener("pointermove", (event) => {
        const box = this.svg.getBoundingClientRect();
        this.point(this.toX(event.clientX - box.left), false);
      });
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    draw() {
      const panel = this.panel;
      this.leave();
      this.svg.replaceChildren();
      const width = Math.max(220, Math.floor(this.figure.clientWidth - 20));
      const height = width < 480 ? 210 : 240;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.setAttribute("height", height);
      this.runs = data.runs.map((_, run) => run).filter((run) => visible(run) && panel.series[run].y.length);
      const range = extent(panel, this.runs);
      this.range = range;
      if (range === null) {
        const text = this.runs.length || data.runs.some((_, run) => visible(run)) ? "nothing recorded" : "all runs are hidden";
        element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg, text);
        return;
      }
      const y = vertical(panel, range);
      const bottom = height - 40;
      const top = 8;
      const yTicks = y.log ? logTicks(y.y0, y.y1, 7) : multiples(y.y0, y.y1, niceStep(y.y1 - y.y0, 5));
      const left = 10 + Math.max(...yTicks.map((tick) => textWidth(plain(tick))));
      const thresholds = panel.thresholds ? data.thresholds.filter((value) => value < y.y1) : [];
      const right = width - (thresholds.length ? 12 + Math.max(...thresholds.map((value) => textWidth(plain(value)))) : 12);
      const scale = y.log ? Math.log : (value) => value;
      const [low, high] = [scale(y.y0), scale(y.y1)];
      this.frame = { left, right, top, bottom, width };
      this.mapX = (value) => left + ((value - range.x0) / (range.x1 - range.x0)) * (right - left);
      this.mapY = (value) => bottom - ((scale(value) - low) / (high - low)) * (bottom - top);
      this.axes(yTicks);
      this.lines = element("g", {}, this.svg);
      for (const run of this.runs) this.curve(run);
      this.limits(thresholds);
      this.marks = element("g", {}, this.svg);
      this.fade();
    }

    axes(yTicks) {
      const { left, right, top, bottom, width } = this.frame;
      const grid = element("g", {}, this.svg);
      for (const tick of yTicks) {
        const y = this.mapY(tick);
        element("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }, grid);
        element("text", { class: "ylabel", x: left - 6, y: y + 4, "text-anchor": "end" }, grid, plain(tick));
      }
      const label = (tick) => shownX(this.panel, tick);
      let xTicks = [];
      for (let count = Math.max(2, Math.floor((right - left) / 64)); count >= 1; count -= 1) {
        const step = this.panel.x === "seconds" ? timeStep(this.range.x1, count) : niceStep(this.range.x1, count);
        xTicks = multiples(0, this.range.x1, step);
        const widest = Math.max(...xTicks.map((tick) => textWidth(label(tick))));
        if (xTicks.length < 2 || this.mapX(step) - this.mapX(0) >= widest + 14) break;
      }
      for (const tick of xTicks) {
        const x = this.mapX(tick);
        const half = textWidth(label(tick)) / 2;
        element("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }, grid);
        const place = Math.min(Math.max(x, half), width - half);
        element("text", { class: "xlabel", x: place, y: bottom + 16, "text-anchor": "middle" }, grid, label(tick));
      }
      element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, grid);
      const name = this.panel.x === "seconds" ? "training time" : "tokens";
      element("text", { class: "xname", x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, grid, name);
    }

    // Over the curves: noisy ones would hide them.
    limits(thresholds) {
      const { left, right } = this.frame;
      const group = element("g", {}, this.svg);
      let above = Infinity;
      for (const value of thresholds) {
        const y = this.mapY(value);
        element("line", { class: "threshold", x1: left, x2: right, y1: y, y2: y }, group);
        if (above - y < 15) continue;
        element("text", { class: "tlabel", x: right + 5, y: y + 4 }, group, plain(value));
        above = y;
      }
    }

    path(xs, ys) {
      let text = "";
      for (let i = 0; i < xs.length; i += 1) text += (i ? "L" : "M") + this.mapX(xs[i]).toFixed(1) + " " + this.mapY(ys[i]).toFixed(1);
      return text;
    }

    curve(run) {
      const s = this.panel.series[run];
      const group = data.runs[run].group;
      const look = { stroke: color(group), "data-group": group };
      const smooth = s.sx && s.sx.length > 1;
      const style = smooth ? "line pale" : s.x.length > 200 ? "line dense" : "line";
      const dashes = dash(group) ? { "stroke-dasharray": dash(group) } : {};
      element("path", { class: style, d: this.path(s.x, s.y), ...look, ...(smooth ? {} : dashes) }, this.lines);
      if (smooth) element("path", { class: "line", d: this.path(s.sx, s.sy), ...look, ...dashes }, this.lines);
      if (s.x.length === 1 || (this.panel.points && s.x.length <= 40)) {
        for (let i = 0; i < s.x.length; i += 1) {
          const place = { cx: this.mapX(s.x[i]), cy: this.mapY(s.y[i]), r: 2.6, fill: color(group), "data-group": group };
          element("circle", place, this.lines);
        }
      }
      let last = -Infinity;
      for (const x of s.broken ?? []) {
        const [cx, cy] = [this.mapX(x), this.frame.top + 5];
        if (cx - last < 13) continue;
        last = cx;
        const d = `M${cx - 4} ${cy - 4}l8 8m0 -8l-8 8`;
        element("path", { class: "line broken", d, ...look }, this.lines);
      }
    }

    fade() {
      for (const item of this.lines?.children ?? []) {
        item.classList.toggle("faded", faded !== null && Number(item.dataset.group) !== faded);
      }
    }

    toX(pixel) {
      if (!this.range) return 0;
      const { left, right } = this.frame;
      return this.range.x0 + ((pixel - left) / (right - left)) * (this.range.x1 - this.range.x0);
    }

    key(event) {
      if (!this.range) return;
      const span = this.range.x1 - this.range.x0;
      const step = span / (event.shiftKey ? 10 : 60);
      const moves = { ArrowRight: step, ArrowLeft: -step, Home: -span, End: span };
      if (event.key === "Escape") this.leave();
      if (!(event.key in moves)) return;
      event.preventDefault();
      const start = this.at ?? this.range.x0 + (event.key === "ArrowLeft" ? span : 0);
      this.point(this.at === null && event.key.startsWith("Arrow") ? start : start + moves[event.key], true);
    }

    // Shows the values nearest to x, and says them where the keyboard asked.
    point(x, aloud) {
      if (!this.range) return;
      this.at = Math.min(Math.max(x, this.range.x0), this.range.x1);
      const found = this.runs.map((run) => ({ run, ...this.nearest(this.panel.series[run]) }));
      this.marks.replaceChildren();
      const pixel = this.mapX(this.at);
      element("line", { class: "cursor", x1: pixel, x2: pixel, y1: this.frame.top, y2: this.frame.bottom }, this.marks);
      for (const item of found) {
        const fill = color(data.runs[item.run].group);
        element("circle", { cx: this.mapX(item.x), cy: this.mapY(item.y), r: 3.4, fill }, this.marks);
      }
      this.fillReadout(found);
      const box = this.readout.getBoundingClientRect();
      const beside = pixel + 24 + box.width > this.figure.clientWidth ? pixel - box.width - 2 : pixel + 24;
      this.readout.style.left = Math.min(Math.max(8, beside), Math.max(8, this.figure.clientWidth - box.width - 8)) + "px";
      this.readout.style.top = this.svg.getBoundingClientRect().top - this.figure.getBoundingClientRect().top + 8 + "px";
      if (aloud) document.getElementById("live").textContent = this.readout.innerText.replaceAll("\n", ", ");
    }

    fillReadout(found) {
      this.readout.hidden = false;
      this.readout.replaceChildren();
      const unit = this.panel.x === "seconds" ? "" : " tokens";
      element("div", {}, this.readout, shownX(this.panel, this.at) + unit);
      const table = element("table", {}, this.readout);
      const shown = found.slice(0, 14);
      for (const item of shown) {
        const row = element("tr", {}, table);
        swatch(data.runs[item.run].group, element("td", {}, row));
        element("td", { class: "name" }, row, data.runs[item.run].label);
        element("td", {}, row, plain(item.y));
      }
      if (shown.length < found.length) element("div", {}, this.readout, `and ${found.length - shown.length} more`);
    }

    nearest(s) {
      let [low, high] = [0, s.x.length - 1];
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (s.x[middle] <= this.at) low = middle;
        else high = middle;
      }
      const index = Math.abs(s.x[high] - this.at) < Math.abs(s.x[low] - this.at) ? high : low;
      return { x: s.x[index], y: s.y[index] };
    }

    leave() {
      this.at = null;
      this.readout.hidden = true;
      this.marks?.replaceChildren();
    }
  }

  function swatch(group, parent) {
    const svg = element("svg", { width: 26, height: 10, "aria-hidden": "true" }, parent);
    const look = { x1: 1, x2: 25, y1: 5, y2: 5, stroke: color(group), "stroke-width": 3 };
    element("line", dash(group) ? { ...look, "stroke-dasharray": dash(group) } : look, svg);
  }

  // The page ----------------------------------------------------------------------------------------------------------

  const panels = data.panels.map((panel) => new Panel(panel, document.getElementById("panels")));
  const drawAll = () => panels.forEach((panel) => panel.draw());

  function legend() {
    const nav = document.getElementById("legend");
    const buttons = data.groups.map((name, group) => {
      const button = element("button", { type: "button", "aria-pressed": "true" }, nav);
      swatch(group, button);
      const members = data.runs.filter((run) => run.group === group).length;
      element("span", {}, button, members > 1 ? `${name} (${members} seeds)` : name);
      const point = (at) => () => {
        faded = at;
        panels.forEach((panel) => panel.fade());
      };
      button.addEventListener("pointerenter", point(group));
      button.addEventListener("pointerleave", point(null));
      button.addEventListener("click", () => {
        if (!hidden.delete(group)) hidden.add(group);
        update();
      });
      button.addEventListener("dblclick", () => {
        const alone = data.groups.every((_, other) => hidden.has(other) === (other !== group));
        hidden.clear();
        if (!alone) data.groups.forEach((_, other) => other !== group && hidden.add(other));
        update();
      });
      return button;
    });
    const update = () => {
      buttons.forEach((button, group) => button.setAttribute("aria-pressed", String(!hidden.has(group))));
      drawAll();
    };
  }

  function themes() {
    const button = document.getElementById("theme");
    const names = ["system", "light", "dark"];
    let chosen = "system";
    try {
      chosen = localStorage.getItem("report-theme") ?? "system";
    } catch {
      // A browser that keeps nothing for files still shows the page.
    }
    const show = () => {
      if (chosen === "system") delete root.dataset.theme;
      else root.dataset.theme = chosen;
      button.textContent = "Theme: " + chosen;
    };
    button.addEventListener("click", () => {
      chosen = names[(names.indexOf(chosen) + 1) % names.length];
      try {
        localStorage.setItem("report-theme", chosen);
      } catch {
        // As above.
      }
      show();
    });
    show();
  }

  themes();
  legend();
  drawAll();
  let width = root.clientWidth;
  window.addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    drawAll();
  });
  window.addEventListener("beforeprint", drawAll);
  root.dataset.ready = "1";
})();
