// The book's own light or dark goes on into the frames of explorers.

function paint() {
  const style = getComputedStyle(document.documentElement);
  const theme = {
    "--jp-ui-font-color1": style.getPropertyValue("--pst-color-text-base"),
    "--jp-layout-color1": style.getPropertyValue("--pst-color-background"),
    "--jp-layout-color2": style.getPropertyValue("--pst-color-surface"),
  };
  for (const frame of document.querySelectorAll("iframe")) {
    frame.contentWindow.postMessage({ theme }, "*");
  }
}

new MutationObserver(paint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
window.addEventListener("message", paint); // an explorer has come
