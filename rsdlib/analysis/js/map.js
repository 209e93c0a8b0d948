// Prompts in the plane: coloured, looked at, lassoed.

explorer((data, box) => {
  const { prompts, numbers, kinds, x, y } = data;
  const n = prompts.length,
    // Room for a picture at its side, as wide as a page of the book may be.
    width = Math.min(560, Math.max(320, (document.body.clientWidth || 820) - 260)),
    height = Math.round(width * 0.786),
    sharp = window.devicePixelRatio || 1;
  let chosen = new Set(),
    cursor = 0,
    by = [...Object.keys(numbers), ...Object.keys(kinds)][0],
    lasso = [];
  const canvas = make("canvas", {
    width: width * sharp,
    height: height * sharp,
    tabindex: 0,
    role: "application",
    "aria-label":
      "map of prompts: arrow keys go to the next prompt that way, Enter selects it, a drawn line selects what is inside",
  });
  canvas.style.cssText = `width:${width}px;height:${height}px;border:1px solid #8886;cursor:crosshair`;
  const context = canvas.getContext("2d");
  context.scale(sharp, sharp);
  const left = Math.min(...x),
    top = Math.min(...y),
    wide = Math.max(...x) - left || 1,
    high = Math.max(...y) - top || 1;
  const px = x.map((value) => 10 + ((value - left) / wide) * (width - 20));
  const py = y.map((value) => 10 + ((value - top) / high) * (height - 20));
  const side = make("div", { class: "side", "aria-live": "polite" });
  const count = make("span", { class: "dim", role: "status" });
  const legend = make("div", { class: "dim" });
  const holds = searcher(prompts);
  const search = searchBox(paint);

  // From blue over grey to orange: told apart by all who see colours differently.
  const blend = (share) =>
    [0, 1, 2].map((k) =>
      Math.round(
        [
          [0, 114, 178],
          [225, 225, 225],
          [213, 94, 0],
        ].reduce((sum, c, j) => sum + c[k] * Math.max(0, 1 - Math.abs(share * 2 - j)), 0),
      ),
    );

  function colours() {
    if (kinds[by]) {
      const values = [...new Set(kinds[by])];
      legend.replaceChildren(
        ...values.flatMap((value, k) => [
          make("span", { style: `color:${COLOURS[k % 7]}` }, "● "),
          `${value}  `,
        ]),
      );
      return kinds[by].map((value) => COLOURS[values.indexOf(value) % 7]);
    }
    const sorted = numbers[by].filter((value) => value !== null).sort((a, b) => a - b);
    const low = sorted[Math.floor(sorted.length * 0.02)],
      top = sorted[Math.ceil(sorted.length * 0.98) - 1];
    legend.textContent = `blue: ${written(low)}, orange: ${written(top)}`;
    return numbers[by].map((value) =>
      value === null
        ? "#8888"
        : `rgb(${blend(Math.min(Math.max((value - low) / (top - low || 1), 0), 1))})`,
    );
  }

  function paint() {
    const found = holds(search.value),
      paints = colours(),
      searched = search.value.trim() !== "";
    context.clearRect(0, 0, width, height);
    let hits = 0;
    for (let i = 0; i < n; i++) {
      const hit = found(i);
      hits += hit;
      context.globalAlpha = searched && !hit ? 0.12 : 0.9;
      context.fillStyle = paints[i];
      context.beginPath();
      context.arc(px[i], py[i], searched && hit ? 5 : 3.5, 0, 7);
      context.fill();
      if (!chosen.has(i)) continue;
      context.strokeStyle = "#D55E00";
      context.lineWidth = 2;
      context.stroke();
    }
    context.globalAlpha = 1;
    context.strokeStyle = "#E69F00";
    context.lineWidth = 3;
    context.beginPath();
    context.arc(px[cursor], py[cursor], 7, 0, 7);
    context.stroke();
    if (lasso.length > 1) {
      context.beginPath();
      lasso.forEach(([a, b], k) => (k ? context.lineTo(a, b) : context.moveTo(a, b)));
      context.closePath();
      context.stroke();
    }
    count.textContent = `${searched ? `${hits} of ` : ""}${n} prompts, ${chosen.size} selected`;
  }

  function look(i) {
    cursor = i;
    side.replaceChildren(
      portrait(data, i, 160, prompts[i]),
      make("div", { class: "text" }, prompts[i]),
      facts(known(data, i)),
    );
    paint();
  }

  const nearest = (a, b, fits = () => true) => {
    let best = -1,
      least = Infinity;
    for (let i = 0; i < n; i++) {
      const distance = (px[i] - a) ** 2 + (py[i] - b) ** 2;
      if (distance < least && fits(i)) {
        least = distance;
        best = i;
      }
    }
    return best;
  };

  // A point is inside where a ray from it crosses the line an odd number of times.
  const inside = (a, b) =>
    lasso.reduce((odd, [x1, y1], k) => {
      const [x2, y2] = lasso[(k + 1) % lasso.length];
      return y1 > b !== y2 > b && a < ((x2 - x1) * (b - y1)) / (y2 - y1) + x1 ? !odd : odd;
    }, false);

  function choose(rows) {
    chosen = new Set(rows);
    select(chosen);
    paint();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    lasso = [[event.offsetX, event.offsetY]];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (lasso.length) {
      lasso.push([event.offsetX, event.offsetY]);
      paint();
    } else {
      const i = nearest(event.offsetX, event.offsetY);
      if (i !== cursor) look(i);
    }
  });
  canvas.addEventListener("pointercancel", () => {
    lasso = [];
    paint();
  });
  canvas.addEventListener("pointerup", () => {
    if (!lasso.length) return;
    const drawn =
      lasso.length > 5
        ? px.map((_, i) => i).filter((i) => inside(px[i], py[i]))
        : [nearest(...lasso[0])];
    lasso = [];
    choose(drawn);
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
      event.key
    ];
    if (way) {
      const ahead = (i) =>
        i !== cursor &&
        (px[i] - px[cursor]) * way[0] + (py[i] - py[cursor]) * way[1] >
          Math.hypot(px[i] - px[cursor], py[i] - py[cursor]) * 0.7;
      const i = nearest(px[cursor], py[cursor], ahead);
      if (i >= 0) look(i);
    } else if (event.key === "Enter" || event.key === " ") {
      const rows = new Set(chosen);
      if (!rows.delete(cursor)) rows.add(cursor);
      choose(rows);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const colour = choice("coloured by", [...Object.keys(numbers), ...Object.keys(kinds)], (name) => {
    by = name;
    paint();
  });
  const found = () => choose(px.map((_, i) => i).filter(holds(search.value)));
  box.append(
    make(
      "div",
      { class: "bar" },
      labelled("coloured by", colour),
      search,
      make("button", { click: found }, "select found"),
      make("button", { click: () => choose([]) }, "clear"),
      count,
    ),
    legend,
    make(
      "div",
      { class: "two" },
      make("div", { style: "overflow:auto;max-width:100%" }, canvas),
      side,
    ),
  );
  look(0);
  return (rows) => {
    chosen = new Set(rows);
    paint();
  };
});
