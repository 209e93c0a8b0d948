// All pairs as thumbnails: sorted, filtered, looked at, selected.

explorer((data, box) => {
  const { prompts, numbers, kinds, flags } = data;
  const size = 30,
    n = prompts.length;
  const chosen = new Set();
  let order = [],
    cursor = 0,
    by = Object.keys(numbers)[0],
    rising = true,
    anchor = null;
  const wanted = {};
  let least = 0,
    most = 100;

  const canvas = make("canvas", {
    tabindex: 0,
    role: "application",
    "aria-label": "grid of pairs: arrow keys move, Enter selects",
  });
  // The canvas stays in sight while what is as tall as all rows scrolls: it holds those in sight.
  const tall = make("div", {}, canvas);
  const scroll = make("div", { class: "scroll", style: "flex:2 1 360px", scroll: grid }, tall);
  const side = make("div", { class: "side", "aria-live": "polite" });
  const count = make("span", { class: "dim", role: "status" });
  const columns = () => Math.max(Math.floor((scroll.clientWidth - 16) / size), 4);
  const holds = searcher(prompts);
  const search = searchBox(arrange);

  const ranked = {};
  for (const [name, values] of Object.entries(numbers)) {
    const sorted = values
      .map((_, i) => i)
      .filter((i) => values[i] !== null)
      .sort((a, b) => values[a] - values[b]);
    ranked[name] = new Array(n).fill(null);
    sorted.forEach((i, rank) => {
      ranked[name][i] = (100 * rank) / Math.max(sorted.length - 1, 1);
    });
  }

  function arrange() {
    const found = holds(search.value),
      rank = ranked[by];
    const inside = (i) =>
      rank[i] === null ? least === 0 && most === 100 : rank[i] >= least && rank[i] <= most;
    const fits = (i) =>
      Object.entries(wanted).every(
        ([name, value]) => !value || (flags[name] ? flags[name][i] : kinds[name][i] === value),
      );
    order = prompts.map((_, i) => i).filter((i) => inside(i) && found(i) && fits(i));
    const unranked = (i) => rank[i] === null; // these stay last
    const way = rising ? 1 : -1;
    order.sort((a, b) => unranked(a) - unranked(b) || way * (rank[a] - rank[b]) || a - b);
    cursor = 0;
    paint();
  }

  function paint() {
    count.textContent = `${order.length} of ${n} pairs, ${chosen.size} selected`;
    grid();
    look();
  }

  function grid() {
    const wide = columns(),
      sharp = window.devicePixelRatio || 1;
    const high = Math.max(Math.ceil(order.length / wide), 1) * size;
    const seen = Math.min(high, 460);
    tall.style.height = `${high}px`;
    canvas.width = wide * size * sharp;
    canvas.height = seen * sharp;
    canvas.style.cssText = `width:${wide * size}px;height:${seen}px;display:block;position:sticky;top:0`;
    const context = canvas.getContext("2d");
    context.scale(sharp, sharp);
    context.translate(0, -scroll.scrollTop);
    const first = Math.floor(scroll.scrollTop / size) * wide;
    const last = Math.ceil((scroll.scrollTop + seen) / size) * wide;
    for (let k = first; k < Math.min(last, order.length); k++) cell(context, order[k], k, wide);
  }

  function cell(context, i, k, wide) {
    const x = (k % wide) * size,
      y = Math.floor(k / wide) * size;
    draw(context, data, i, x, y, size - 2);
    if (!chosen.has(i) && k !== cursor) return;
    context.lineWidth = 3;
    context.strokeStyle = chosen.has(i) ? "#D55E00" : "#E69F00";
    context.strokeRect(x + 1.5, y + 1.5, size - 5, size - 5);
  }

  function look() {
    if (!order.length) {
      side.replaceChildren("no pair fits");
      return;
    }
    const i = order[cursor];
    const rows = known(data, i);
    const causes = Object.keys(flags).filter((name) => flags[name][i]);
    if (causes.length) rows.push(["causes", causes.join(", ")]);
    const curve = data.curves && data.curves[i];
    const parts = [
      portrait(data, i, 160, prompts[i]),
      make("div", { class: "text" }, prompts[i]),
      facts(rows),
    ];
    if (curve && curve.some((value) => value !== null))
      parts.push(
        chart(
          [{ name: "difficulty", values: curve }],
          curve.map((_, e) => e + 1),
          { axis: "difficulty over epochs", height: 140, width: 300 },
        ),
      );
    side.replaceChildren(...parts);
  }

  function move(to) {
    cursor = Math.min(Math.max(to, 0), order.length - 1);
    paint();
    const top = Math.floor(cursor / columns()) * size;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    if (top + size > scroll.scrollTop + scroll.clientHeight)
      scroll.scrollTop = top + size - scroll.clientHeight;
  }

  function toggle(k, through) {
    const from = through ? order.indexOf(anchor) : -1; // the pair may be hidden by now
    const [first, last] = from < 0 ? [k, k] : [Math.min(from, k), Math.max(from, k)];
    for (let at = first; at <= last; at++) {
      if (chosen.has(order[at]) && first === last) chosen.delete(order[at]);
      else chosen.add(order[at]);
    }
    anchor = order[k];
    select(chosen);
    paint();
  }

  const under = (event) =>
    Math.floor((event.offsetY + scroll.scrollTop) / size) * columns() +
    Math.floor(event.offsetX / size);
  canvas.addEventListener("mousemove", (event) => {
    const k = under(event);
    if (k < order.length && k !== cursor) {
      cursor = k;
      grid();
      look();
    }
  });
  canvas.addEventListener("click", (event) => {
    if (under(event) < order.length) toggle(under(event), event.shiftKey);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!order.length) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[
      event.key
    ];
    if (step) move(cursor + step);
    else if (event.key === "Enter" || event.key === " ") toggle(cursor, event.shiftKey);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const percent = Array.from({ length: 101 }, (_, i) => `${i} %`);
  const bar = [
    labelled(
      "sorted by",
      choice("sorted by", Object.keys(numbers), (name) => {
        by = name;
        arrange();
      }),
    ),
    make(
      "button",
      {
        click: () => {
          rising = !rising;
          arrange();
        },
      },
      "turn around",
    ),
    slider("from", percent, 0, (at) => {
      least = at;
      arrange();
    }).box,
    slider("to", percent, 100, (at) => {
      most = at;
      arrange();
    }).box,
    ...Object.entries(kinds).map(([name, values]) =>
      labelled(
        name,
        choice(name, [["", "all"], ...new Set(values)], (value) => {
          wanted[name] = value;
          arrange();
        }),
      ),
    ),
    search,
  ];
  if (Object.keys(flags).length) {
    const causes = choice("cause", [["", "any"], ...Object.keys(flags)], (value) => {
      for (const name of Object.keys(flags)) wanted[name] = name === value;
      arrange();
    });
    bar.push(labelled("cause", causes));
  }
  bar.push(
    make(
      "button",
      {
        click: () => {
          for (const i of order) chosen.add(i);
          select(chosen);
          paint();
        },
      },
      "select all shown",
    ),
    make(
      "button",
      {
        click: () => {
          chosen.clear();
          select(chosen);
          paint();
        },
      },
      "clear",
    ),
    count,
  );
  box.append(make("div", { class: "bar" }, ...bar), make("div", { class: "two" }, scroll, side));
  new ResizeObserver(() => paint()).observe(scroll);
  arrange();
  return (rows) => {
    for (const row of rows) chosen.add(row);
    paint();
  };
});
