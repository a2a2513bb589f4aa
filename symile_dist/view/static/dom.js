// Elements, made without markup: nothing that a run says is ever read as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; `on...` listens, `class` and the like are set, null children are left out. */
export function h(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [property, each] of Object.entries(value)) element.style.setProperty(property, each);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Writes text only where it differs, so that readers of the screen are not told the same again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A bar of parts: [{label, value, colour, text}], with its legend. */
export function stackedBar(parts, label) {
  const sum = parts.reduce((total, part) => total + part.value, 0);
  const bar = h("div", { class: "bar", role: "img", "aria-label": `${label}: ${parts.map((part) => `${part.label} ${part.text}`).join(", ")}` });
  const legend = h("ul", { class: "legend" });
  for (const part of parts) {
    if (part.value > 0) {
      bar.append(h("span", { title: `${part.label}: ${part.text}`, style: { "flex-grow": part.value / sum, background: part.colour } }));
    }
    legend.append(
      h("li", {}, h("span", { class: "swatch", style: { background: part.colour } }), h("span", {}, part.label), h("b", {}, part.text)),
    );
  }
  return [bar, legend];
}

export function remember(key, value) {
  try {
    localStorage.setItem(`symile_dist.${key}`, JSON.stringify(value));
  } catch {
    // A browser that keeps nothing.
  }
}

export function remembered(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`symile_dist.${key}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
