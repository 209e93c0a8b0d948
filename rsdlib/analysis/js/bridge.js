// Between an explorer's page, in its frame, and Python: this much alone runs in JupyterLab itself.

const COLOURS = ["--jp-ui-font-color1", "--jp-layout-color1", "--jp-layout-color2"];

/** Return the colours of JupyterLab's theme. */
function theme() {
  const style = getComputedStyle(document.body);
  return Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(name)]));
}

export default {
  initialize({ model }) {
    let page = null;
    const tell = (what) => page && page.postMessage(what, "*");
    const hear = (event) => {
      if (!event.data || event.data.explorer !== model.get("key")) return;
      page = event.source;
      tell({ theme: theme() });
      try {
        model.send(event.data.told);
      } catch {
        tell({ live: false }); // the kernel is gone
      }
    };
    const painter = new MutationObserver(() => tell({ theme: theme() }));
    painter.observe(document.body, { attributes: true });
    window.addEventListener("message", hear);
    model.on("msg:custom", tell);
    return () => {
      tell({ live: false });
      painter.disconnect();
      window.removeEventListener("message", hear);
    };
  },
};
