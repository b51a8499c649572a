// Building and finding elements. Text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** h('button', {class: 'quiet', onclick: f}, 'Copy') */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** What a screen reader says, once. */
export function announce(text) {
  $("status").textContent = text;
}

/** `again` is what to do on “Try again”. */
export function notice(text, again = null) {
  const box = $("notice");
  const button = (name, act) => h("button", { type: "button", class: "quiet", onclick: () => { notice(""); act?.(); } }, name);
  box.hidden = !text;
  box.replaceChildren(...(text ? [h("span", {}, text), h("span", { class: "row" }, again && button("Try again", again), button("Dismiss"))] : []));
}

/** Gives the focus to `element` if what had it is gone or hidden, and takes it from nothing else. */
export function catchFocus(element) {
  const active = document.activeElement;
  if (!active || active === document.body || active.hidden) element.focus();
}

export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = before; }, 1500);
}

/** Calls f at most once a frame. */
export function eachFrame(f) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; f(); });
  };
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit ? count.toFixed(count < 10 ? 2 : 1) : Math.round(count)} ${units[unit]}`;
}
