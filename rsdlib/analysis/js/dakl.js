// DAKL on validation: width of the kernel, strength of the ridge, share in the blend.

explorer((data, box) => {
  const { gammas, alphas, blends, cosines, off } = data; // cosines: gamma x alpha x blend
  const at = { gamma: data.best[0], alpha: data.best[1], blend: data.best[2] };
  const canvas = make("canvas", {
    width: 600,
    height: 420,
    role: "img",
    "aria-label": "gain over the ensemble, by gamma and alpha",
  });
  canvas.style.cssText = "width:300px;height:210px;border:1px solid #8886;cursor:pointer";
  const said = make("div", { role: "status" }),
    side = make("div", { class: "side" });
  const sliders = {};

  function show() {
    const { gamma, alpha, blend } = at,
      value = cosines[gamma][alpha][blend];
    const spread = Math.max(...cosines.flat().map((row) => Math.abs(row[blend] - off)), 1e-6);
    const context = canvas.getContext("2d"),
      wide = canvas.width / alphas.length,
      high = canvas.height / gammas.length;
    gammas.forEach((_, g) =>
      alphas.forEach((_, a) => {
        const share = (cosines[g][a][blend] - off) / spread,
          fade = Math.round(235 - 150 * Math.abs(share));
        context.fillStyle =
          share >= 0
            ? `rgb(${fade},${fade},235)`
            : `rgb(235,${fade},${fade - 40 > 0 ? fade - 40 : 0})`;
        context.fillRect(a * wide, canvas.height - (g + 1) * high, wide, high);
      }),
    );
    context.strokeStyle = "#E69F00";
    context.lineWidth = 6;
    context.strokeRect(
      alpha * wide + 3,
      canvas.height - (gamma + 1) * high + 3,
      wide - 6,
      high - 6,
    );
    const gain = value - off;
    said.replaceChildren(
      make("b", {}, `cosine ${value.toFixed(4)}`),
      ` on validation, the ensemble alone ${off.toFixed(4)}: ${gain >= 0 ? "+" : ""}${gain.toFixed(4)}`,
    );
    const flat = blends.map(() => off);
    side.replaceChildren(
      chart(
        [
          { name: "blend", values: cosines[gamma][alpha] },
          { name: "off", values: flat, dim: true },
        ],
        blends,
        { at: blend, axis: "share of DAKL in the blend" },
      ),
      chart(
        [
          { name: "gamma", values: gammas.map((_, g) => cosines[g][alpha][blend]) },
          { name: "off", values: gammas.map(() => off), dim: true },
        ],
        gammas,
        { at: gamma, axis: "γ" },
      ),
    );
  }

  for (const [name, values] of Object.entries({ gamma: gammas, alpha: alphas, blend: blends }))
    sliders[name] = slider(
      { gamma: "γ", alpha: "α", blend: "blend" }[name],
      values,
      at[name],
      (to) => {
        at[name] = to;
        show();
      },
    );
  canvas.addEventListener("click", (event) => {
    const places = {
      alpha: Math.floor((event.offsetX / canvas.clientWidth) * alphas.length),
      gamma: gammas.length - 1 - Math.floor((event.offsetY / canvas.clientHeight) * gammas.length),
    };
    for (const [name, to] of Object.entries(places)) {
      sliders[name].input.value = to;
      sliders[name].input.dispatchEvent(new Event("input"));
    }
  });
  const map = make(
    "figure",
    {},
    canvas,
    make(
      "figcaption",
      { class: "dim" },
      "across α, up γ; blue gains over the ensemble, orange loses",
    ),
  );
  box.append(
    make("div", { class: "bar" }, ...Object.values(sliders).map((one) => one.box)),
    said,
    make("div", { class: "two" }, map, side),
  );
  show();
});
