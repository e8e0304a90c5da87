// Reads a report as a user sees it: what overlaps, what sticks out, what happens on pointing, typing and clicking.
function inspect(win) {
  const doc = win.document;
  const root = doc.documentElement;
  const figures = [...doc.querySelectorAll("#panels figure")];
  const box = (item) => item.getBoundingClientRect();
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlaps = [];
  const outside = [];
  for (const figure of figures) {
    const title = figure.querySelector("figcaption").firstChild.textContent;
    const texts = [...figure.querySelectorAll("svg text"), figure.querySelector("figcaption")];
    const frame = box(figure);
    texts.forEach((text, index) => {
      const here = box(text);
      if (here.left < frame.left - 1 || here.right > frame.right + 1 || here.bottom > frame.bottom + 1) outside.push(`${title}: ${text.textContent}`);
      for (const other of texts.slice(index + 1)) {
        if (overlap(here, box(other))) overlaps.push(`${title}: ${text.textContent} / ${other.textContent}`);
      }
    });
  }
  const buttons = [...doc.querySelectorAll("#legend button")];
  buttons.forEach((button, index) => {
    for (const other of buttons.slice(index + 1)) if (overlap(box(button), box(other))) overlaps.push(`legend: ${button.textContent}`);
  });

  const svg = figures[0].querySelector("svg");
  const readout = figures[0].querySelector(".readout");
  const place = box(svg);
  const at = { clientX: place.left + place.width * 0.6, clientY: place.top + 50, bubbles: true };
  svg.dispatchEvent(new win.PointerEvent("pointermove", at));
  const pointed = { shown: !readout.hidden, text: readout.innerText, inside: ["left", "top"].every((side) => box(readout)[side] >= box(figures[0])[side]) && ["right", "bottom"].every((side) => box(readout)[side] <= box(figures[0])[side]) };
  svg.dispatchEvent(new win.PointerEvent("pointerleave"));
  pointed.gone = readout.hidden;
  svg.dispatchEvent(new win.KeyboardEvent("keydown", { key: "End", bubbles: true }));
  const typed = doc.getElementById("live").textContent;
  svg.dispatchEvent(new win.KeyboardEvent("keydown", { key: "Escape", bubbles: true }));

  const lines = () => doc.querySelectorAll('#panels path[data-group="0"]').length;
  const before = lines();
  buttons[0].click();
  const hidden = { before, after: lines(), pressed: buttons[0].getAttribute("aria-pressed") };
  buttons[0].click();
  hidden.again = lines();

  const theme = doc.getElementById("theme");
  const colors = {};
  for (let turn = 0; turn < 3; turn += 1) {
    const style = win.getComputedStyle(doc.body);
    colors[root.dataset.theme ?? "system"] = [style.backgroundColor, style.color];
    theme.click();
  }
  return {
    ready: root.dataset.ready ?? null,
    error: root.dataset.error ?? null,
    width: win.innerWidth,
    titles: figures.map((figure) => figure.querySelector("figcaption").firstChild.textContent),
    curves: figures.map((figure) => figure.querySelectorAll("path[data-group]").length),
    ticks: figures.map((figure) => ["xlabel", "ylabel"].map((name) => figure.querySelectorAll("." + name).length)),
    covered: [...doc.querySelectorAll(".threshold")].filter((line) => [...doc.querySelectorAll("#panels path.line")].some((path) => line.closest("svg") === path.closest("svg") && line.compareDocumentPosition(path) & 4)).length,
    thresholds: [...doc.querySelectorAll(".tlabel")].map((text) => text.textContent),
    sizes: [...new Set([...doc.querySelectorAll("#panels text")].map((text) => win.getComputedStyle(text).fontSize))],
    legend: buttons.map((button) => button.textContent),
    wide: root.scrollWidth - win.innerWidth,
    requests: win.performance.getEntriesByType("resource").map((entry) => entry.name),
    intruders: doc.querySelectorAll("img, b").length,
    overlaps, outside, pointed, typed, hidden, colors,
  };
}
