// Draws the plots with the colours of the page, and again when those change (light, dark, print).
(() => {
  "use strict";
  const plots = JSON.parse(document.getElementById("plots-data").textContent);
  const coloured = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((entry) => coloured(entry, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, coloured(entry, style)]));
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [name, plot] of Object.entries(plots)) {
      const made = coloured(plot, style);
      Plotly.react(document.getElementById(name), made.data, made.layout, { displayModeBar: false, responsive: true });
    }
  };
  draw();
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
})();
