// One picture, and what every reader makes of it.

explorer((data, box, again) => {
  const { prompts, readers } = data;
  const names = Object.keys(readers);
  let order = prompts.map((_, i) => i),
    place = 0;

  const found = make("span", { class: "dim", "aria-live": "polite" });
  const side = make("div", { class: "side", "aria-live": "polite" });
  const frame = make("div");

  function words(reading) {
    return make(
      "span",
      {},
      ...reading.words.flatMap(([word, probability, right]) => [
        make(
          "span",
          right ? { class: "right", title: "stands in the prompt" } : {},
          `${right ? "✓ " : ""}${word} ${written(probability)}`,
        ),
        " ",
      ]),
    );
  }

  function show(to) {
    place = order.length ? (to + order.length) % order.length : 0;
    found.textContent = order.length
      ? `${place + 1} of ${order.length}`
      : "no prompt holds these words";
    if (!order.length) return;
    const i = order[place];
    frame.replaceChildren(portrait(data, i, 224, prompts[i]));
    const rows = names.map((name) => {
      const reading = readers[name][i];
      const lines = [
        words(reading),
        ...reading.near.map((near) => make("div", { class: "text" }, near)),
      ];
      if (reading.caption)
        lines.push(make("div", { class: "text" }, `caption: ${reading.caption}`));
      if (reading.unlike)
        lines.push(make("div", {}, "⚠ unlike all that this reader was trained on"));
      return make(
        "tr",
        {},
        make("th", {}, name),
        make("td", {}, written(reading.cosine)),
        make("td", {}, ...lines),
      );
    });
    const widths = { reader: "7em", cosine: "5em", "words, nearest prompts": "auto" };
    const head = make(
      "tr",
      {},
      ...Object.entries(widths).map(([name, width]) =>
        make("th", { style: `width:${width}` }, name),
      ),
    );
    const notes =
      data.notes && data.notes[i] ? [make("div", { class: "text dim" }, data.notes[i])] : [];
    side.replaceChildren(
      make(
        "div",
        { class: "text" },
        prompts[i] ? `asked for: ${prompts[i]}` : "no prompt is known",
      ),
      ...notes,
      make("table", {}, make("tbody", {}, head, ...rows)),
    );
  }

  function sort(by, best) {
    const score = (i) => readers[by][i].cosine;
    order.sort((a, b) => (best ? score(b) - score(a) : score(a) - score(b)) || a - b);
    show(0);
  }

  const holds = searcher(prompts);
  const search = searchBox(() => {
    order = prompts.map((_, i) => i).filter(holds(search.value));
    show(0);
  });
  let by = names[0];
  const button = (text, act) => make("button", { click: act }, text);
  const bar = [
    button("previous", () => show(place - 1)),
    button("next", () => show(place + 1)),
    button("random", () => show(Math.floor(Math.random() * order.length))),
  ];
  if (data.scored) {
    const reader = choice("reader that best and worst are judged by", names, (name) => {
      by = name;
    });
    bar.push(
      button("best", () => sort(by, true)),
      button("worst", () => sort(by, false)),
      labelled("of", reader),
    );
  }
  const keys = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && !["INPUT", "SELECT"].includes(event.target.tagName)) {
      show(place + step);
      event.preventDefault();
    }
  };
  box.addEventListener("keydown", keys);
  box.append(
    ...(data.asks ? [asking(data, again)] : []),
    make("div", { class: "bar" }, ...bar, search, found),
    make("div", { class: "two" }, frame, side),
  );
  show(0);
});

/** Return the place where a picture of one's own is handed in, as a file or by its path. */
function asking(data, again) {
  const said = make("span", { role: "status" }, data.said || "");
  const ask = (question) => {
    if (question.path === "") return;
    said.textContent = "reading …";
    tell({ question });
  };
  const file = make("input", {
    type: "file",
    accept: "image/*",
    "aria-label": "picture of your own",
  });
  file.addEventListener("change", () => {
    const [chosen] = file.files;
    if (!chosen) return;
    if (chosen.size > 10e6) {
      said.textContent = "above 10 MB: give its path instead";
      return;
    }
    const reader = new FileReader();
    reader.onload = () => ask({ name: chosen.name, content: reader.result.split(",")[1] });
    reader.readAsDataURL(chosen);
  });
  const path = make("input", {
    type: "text",
    placeholder: "or its path",
    "aria-label": "path of a picture",
    size: 24,
  });
  path.addEventListener("keydown", (event) => {
    if (event.key === "Enter") ask({ path: path.value });
    event.stopPropagation();
  });
  return make(
    "div",
    { class: "bar live" },
    file,
    path,
    make("button", { click: () => ask({ path: path.value }) }, "read"),
    ...(data.own ? [make("button", { click: again }, "back to the others")] : []),
    said,
  );
}
