// What all explorers share. Text out of data becomes text nodes, never HTML.

const STYLE = `
body { margin: 0; background: var(--jp-layout-color1, Canvas); }
.rsd { font: 13px/1.4 system-ui, "Noto Sans", "Noto Color Emoji", sans-serif; padding: 8px;
  color: var(--jp-ui-font-color1, CanvasText); background: var(--jp-layout-color1, Canvas); }
.rsd .bar { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center;
  margin-bottom: 8px; }
.rsd .two { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.rsd .side { flex: 1 1 230px; min-width: 0; max-width: 100%; }
.rsd .text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9em; overflow-y: auto;
  unicode-bidi: plaintext; }
.rsd .scroll { overflow: auto; max-height: 460px; max-width: 100%; border: 1px solid #8886; }
.rsd button, .rsd select, .rsd input { font: inherit; color: inherit; max-width: 100%;
  background: var(--jp-layout-color2, Field); border: 1px solid #888a; border-radius: 3px;
  padding: 2px 7px; }
.rsd input[type=range] { padding: 0; vertical-align: middle; }
.rsd :focus-visible { outline: 3px solid #e69f00; outline-offset: 1px; }
.rsd table { border-collapse: collapse; width: 100%; table-layout: fixed; color: inherit; }
.rsd td, .rsd th { text-align: left; vertical-align: top; padding: 3px 8px 3px 0;
  border-top: 1px solid #8884; overflow-wrap: anywhere; font-size: 13px; background: none; }
.rsd .right { background: #009e73; color: white; border-radius: 3px; padding: 0 4px; }
body:not(.live) .rsd .live { display: none; }
.rsd .dim { opacity: .72; }
.rsd canvas { touch-action: none; max-width: none; }
.rsd figure { margin: 0; }
.rsd svg text { fill: currentColor; font-size: 11px; }`;

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"];

/** Return an element: functions among its attributes listen, all else is set. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Return what Python packed: deflated JSON in base64, with its sheet of pictures loaded. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).json();
  if (data.sheet) {
    data.image = new Image();
    data.image.src = data.sheet;
    await data.image.decode();
  }
  return data;
}

/** Draw picture `i` of the sheet into a square of a canvas. */
function draw(context, data, i, x, y, size) {
  const left = (i % data.columns) * data.side,
    top = Math.floor(i / data.columns) * data.side;
  context.drawImage(data.image, left, top, data.side, data.side, x, y, size, size);
}

/** Return a canvas with picture `i`, `size` pixels a side. */
function portrait(data, i, size, name = "picture") {
  const sharp = window.devicePixelRatio || 1;
  const canvas = make("canvas", {
    width: size * sharp,
    height: size * sharp,
    role: "img",
    "aria-label": name,
  });
  canvas.style.cssText = `width:${size}px;height:${size}px`;
  draw(canvas.getContext("2d"), data, i, 0, 0, size * sharp);
  return canvas;
}

/** Return a labelled control. */
function labelled(name, control) {
  return make("label", {}, `${name} `, control);
}

/** Return a select with some options, [value, text] or text alone. */
function choice(name, options, change) {
  const select = make("select", { "aria-label": name, change: () => change(select.value) });
  for (const option of options) {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    select.append(make("option", { value }, text));
  }
  return select;
}

/** Return a slider over the places of a list, and the text that says which it is at. */
function slider(name, places, at, change) {
  const said = make("output", { style: "display:inline-block;min-width:5em" }, String(places[at]));
  const input = make("input", {
    type: "range",
    min: 0,
    max: places.length - 1,
    step: 1,
    value: at,
    "aria-label": name,
  });
  const say = () => {
    said.textContent = String(places[input.value]);
    input.setAttribute("aria-valuetext", said.textContent);
  };
  input.addEventListener("input", () => {
    say();
    change(Number(input.value));
  });
  say();
  return { input, box: make("label", {}, `${name} `, input, " ", said) };
}

/** Return the box for the words that prompts are searched by. */
function searchBox(change) {
  const name = { placeholder: "words", "aria-label": "search in prompts" };
  return make("input", { type: "search", size: 12, input: change, ...name });
}

/** Return a function that finds the prompts which hold all words of a text. */
function searcher(prompts) {
  const lower = prompts.map((prompt) => prompt.toLowerCase());
  return (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    return (i) => words.every((word) => lower[i].includes(word));
  };
}

/** Return lines over x as SVG: series [{name, values, dim}], a mark at index `at`. */
function chart(series, labels, { at = null, width = 360, height = 170, axis = "" } = {}) {
  const all = series.flatMap((one) => one.values).filter((value) => value !== null);
  if (!all.length) return make("div", { class: "dim" }, `${axis}: not measured`);
  const low = Math.min(...all),
    high = Math.max(...all),
    range = high - low || 1;
  const x = (i) => 42 + (i * (width - 58)) / Math.max(labels.length - 1, 1);
  const y = (value) => height - 34 - ((value - low) / range) * (height - 52);
  const svg = make("svg", {
    width,
    height,
    role: "img",
    viewBox: `0 0 ${width} ${height}`,
    style: "max-width:100%;height:auto",
  });
  svg.setAttribute("aria-label", `${axis}: ${series.map((one) => one.name).join(", ")}`);
  for (const value of [low, high]) {
    svg.append(
      make("text", { x: 38, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(3)),
    );
    svg.append(
      make("line", { x1: 42, x2: width - 16, y1: y(value), y2: y(value), stroke: "#8886" }),
    );
  }
  const every = Math.ceil(labels.length / 7);
  labels.forEach((label, i) => {
    if (i % every === 0)
      svg.append(make("text", { x: x(i), y: height - 20, "text-anchor": "middle" }, String(label)));
  });
  svg.append(make("text", { x: width / 2, y: height - 5, "text-anchor": "middle" }, axis));
  if (at !== null)
    svg.append(
      make("line", {
        x1: x(at),
        x2: x(at),
        y1: 8,
        y2: height - 34,
        stroke: "#E69F00",
        "stroke-width": 3,
      }),
    );
  series.forEach((one, k) => {
    const places = one.values
      .map((value, i) => (value === null ? null : [x(i), y(value)]))
      .filter(Boolean);
    const path = places.map(([px, py], i) => `${i ? "L" : "M"}${px} ${py}`).join("");
    const line = {
      stroke: one.colour || COLOURS[k % 7],
      fill: "none",
      "stroke-width": 2,
      opacity: one.dim ? 0.45 : 1,
    };
    svg.append(make("path", { d: path, ...line }));
    for (const [cx, cy] of places)
      svg.append(make("circle", { cx, cy, r: 2.5, fill: line.stroke, opacity: line.opacity }));
  });
  return svg;
}

/** Return the numbers and kinds of row `i`, as [name, value] rows. */
function known({ numbers, kinds }, i) {
  const columns = [...Object.entries(numbers), ...Object.entries(kinds)];
  return columns.map(([name, values]) => [name, written(values[i])]);
}

/** Return what is known of a pair as a table: [name, value] rows. */
function facts(rows) {
  const body = rows.map(([name, value]) =>
    make("tr", {}, make("th", { style: "width:8.5em" }, name), make("td", {}, value)),
  );
  return make("table", {}, make("tbody", {}, ...body));
}

/** Return a value as text: whole numbers as they are, others by four digits. */
function written(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(4)));
}

/** Tell Python something, if it listens: see bridge.js. */
function tell(told) {
  parent.postMessage({ explorer: KEY, told }, "*");
}

/** Tell Python which rows are selected. */
function select(rows) {
  tell({ selected: [...rows].sort((a, b) => a - b) });
}

/**
 * Show what a function fills an element with, from what was packed. It also gets a way back to what
 * was there before anything was asked; what it returns takes up rows that were selected before.
 */
function explorer(fill) {
  let recall = null;
  const show = async (packed) => {
    const box = make("div", { class: "rsd" });
    try {
      recall = await fill(await unpack(packed), box, () => show(PACKED));
    } catch (error) {
      box.replaceChildren(`This explorer cannot be shown: ${error.message}`);
      console.error(error);
    }
    document.body.replaceChildren(make("style", {}, STYLE), box);
  };
  // Python may not listen yet, or never: a saved page goes on without.
  let calls = 0;
  const calling = setInterval(() => (calls++ < 40 ? tell({}) : clearInterval(calling)), 250);
  window.addEventListener("message", ({ source, data }) => {
    if (source !== parent || source === window) return;
    for (const [name, colour] of Object.entries(data.theme || {})) {
      document.documentElement.style.setProperty(name, colour);
    }
    if (data.live && !document.body.classList.contains("live")) {
      clearInterval(calling);
      if (recall && data.selected.length) recall(data.selected);
    }
    if ("live" in data) document.body.classList.toggle("live", data.live);
    if (data.packed) show(data.packed);
  });
  show(PACKED);
}
