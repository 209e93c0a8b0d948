// A prompt drawn by the original and with a reader in its place, from one step on.

explorer((data, box) => {
  const { prompts, encoders, places, measures, original } = data;
  const at = { prompt: 0, encoder: 0, place: 0 };
  const pictures = make("div", { class: "two" }),
    side = make("div", { class: "side", "aria-live": "polite" });
  const mean = (values) => {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  // Pictures lie in the order of prompts, then the original and each encoder at each place.
  const number = (prompt, encoder, place) =>
    prompt * (encoders.length * places.length + 1) + 1 + encoder * places.length + place;

  function figure(i, name, scores) {
    const said = Object.entries(scores).map(([kind, value]) =>
      make("div", {}, `${kind} ${written(value)}`),
    );
    return make(
      "figure",
      {},
      portrait(data, i, 208, name),
      make("figcaption", {}, make("b", {}, name), ...said),
    );
  }

  function show() {
    const { prompt, encoder, place } = at;
    const swapped = Object.fromEntries(
      Object.entries(measures).map(([kind, values]) => [kind, values[prompt][encoder][place]]),
    );
    const before = Object.fromEntries(
      Object.entries(original).map(([kind, values]) => [kind, values[prompt]]),
    );
    pictures.replaceChildren(
      figure(number(prompt, 0, 0) - 1, "original", before),
      figure(
        number(prompt, encoder, place),
        `${encoders[encoder]}, from step ${places[place]}`,
        swapped,
      ),
    );
    const charts = Object.entries(measures).map(([kind, values]) => {
      const lines = encoders.map((name, e) => ({
        name,
        dim: e !== encoder,
        colour: COLOURS[e % 7],
        values: places.map((_, s) => mean(values.map((one) => one[e][s]))),
      }));
      lines.push({
        name: "original",
        colour: "#888888",
        dim: true,
        values: places.map(() => mean(original[kind])),
      });
      return chart(lines, places, {
        at: place,
        axis: `${kind}, mean over prompts, by first step swapped`,
      });
    });
    const legend = encoders.map((name, e) =>
      make("span", { style: `color:${COLOURS[e % 7]};margin-right:1em` }, `● ${name}`),
    );
    side.replaceChildren(
      make("div", { class: "text" }, prompts[prompt]),
      make("div", {}, ...legend),
      ...charts,
    );
  }

  const sliders = [
    ["prompt", prompts.map((_, i) => i + 1)],
    ["encoder", encoders],
    ["place", places],
  ].map(([name, values]) =>
    slider(name === "place" ? "first step swapped" : name, values, 0, (to) => {
      at[name] = to;
      show();
    }),
  );
  box.append(
    make("div", { class: "bar" }, ...sliders.map((one) => one.box)),
    make("div", { class: "two" }, pictures, side),
  );
  show();
});
