// Equations, by the copy of KaTeX that `make docs` puts beside this file (pages without equations load nothing; without
// JavaScript they stay as TeX), and keyboard access to what scrolls sideways in a narrow window.
const beside = (name) => new URL(`katex/${name}`, document.currentScript.src).href;
const [code, style] = [beside("katex.min.js"), beside("katex.min.css")];

function reachable() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset .arithmatex")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const equations = document.querySelectorAll(".arithmatex");
  if (equations.length === 0) return;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: style }));
  const script = Object.assign(document.createElement("script"), { src: code });
  script.addEventListener("load", () => {
    for (const equation of equations) {
      const text = equation.textContent.trim(); // \(...\) or \[...\]
      katex.render(text.slice(2, -2), equation, { displayMode: text.startsWith("\\["), throwOnError: false });
    }
    reachable();
  });
  document.head.append(script);
});
addEventListener("load", () => {
  document.querySelectorAll(".md-code__nav").forEach((nav, n) => nav.setAttribute("aria-label", `Code block ${n + 1}`));
});
addEventListener("load", () => new ResizeObserver(reachable).observe(document.querySelector("article") ?? document.body));
