// The view of the experts: which of them each token went to, how evenly they work, and what the cache holds.

import { bytes, eachFrame, h } from "./dom.js";

const MOST_TOKENS = 600; // chips on show; the counts go on

export class ExpertView {
  constructor(root) {
    this.root = root;
    this.facts = null;
    this.draw = eachFrame(() => this.update());
    new ResizeObserver(this.draw).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.draw);
  }

  get layers() { return this.facts?.experts?.layers ?? []; }
  get count() { return this.facts?.experts?.n_routed_experts ?? 0; }

  setFacts(facts) {
    const known = this.facts?.model === facts.model && JSON.stringify(this.facts.experts) === JSON.stringify(facts.experts);
    this.facts = facts;
    if (!known) this.build();
    this.draw();
  }

  /** Forget the tokens: a new answer begins. */
  reset() {
    this.tokens = [];
    this.load = this.layers.map(() => new Uint32Array(this.count));
    this.entropy = this.layers.map(() => 0);
    this.selected = -1;
    this.follow = true;
    this.cursor = null;
    this.length = 0;
    this.strip?.replaceChildren();
    this.draw();
  }

  /** Takes one report of the server. */
  add(report) {
    report.tokens.forEach((text, t) => {
      this.tokens.push({
        text,
        position: report.first + t,
        generated: report.first + t >= report.prompt_tokens,
        experts: report.experts.map((layer) => layer[t]),
        weights: report.weights.map((layer) => layer[t]),
      });
      report.experts.forEach((layer, l) => {
        layer[t].forEach((expert) => { this.load[l][expert] += 1; });
        this.entropy[l] += report.entropy[l][t];
      });
    });
    this.length = Math.max(this.length, report.first + report.tokens.length);
    if (this.follow) this.selected = this.tokens.length - 1;
    this.draw();
  }

  /** How long the text is now, where nothing reports it token by token. */
  setLength(tokens) {
    this.length = tokens;
    this.draw();
  }

  // ---- building

  build() {
    const experts = this.facts.experts;
    this.strip = null;
    if (!experts) {
      this.root.replaceChildren(
        h("p", {}, `${this.facts.model} has no experts: every token goes through all of its weights. A model of the DeepSeek family with experts fills this view.`),
        this.buildCache(),
      );
      this.reset();
      return;
    }
    const shared = experts.n_shared_experts ? `, and ${experts.n_shared_experts} shared by all` : "";
    this.strip = h("div", { class: "strip", role: "listbox", tabindex: "0", "aria-label": "Tokens, in order", onkeydown: (e) => this.stripKey(e) });
    this.strip.addEventListener("click", (e) => { const chip = e.target.closest("[role=option]"); if (chip) this.select(Number(chip.dataset.index)); });
    this.rows = experts.layers.map((layer, l) => this.buildRow(layer, l));
    this.detail = h("p", { class: "detail", role: "status" });
    this.numbers = h("dl", { class: "numbers" });
    const grid = h("div", { class: "heat", tabindex: "0", role: "group", "aria-label": "Load by layer and expert. Arrow keys move from cell to cell, what they hold is read out.", onkeydown: (e) => this.gridKey(e), onpointerleave: () => { this.cursor = null; this.draw(); } },
      h("table", {},
        h("caption", { class: "hidden" }, "How the picks of all tokens so far are spread over the experts of each layer"),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col", class: "grow" }, `Experts 0 to ${this.count - 1}`), h("th", { scope: "col", title: "Entropy of the load: 1 when all experts get the same" }, "Even"), h("th", { scope: "col", class: "wide-only", title: "Largest load over the mean, less 1 (MaxVio)" }, "MaxVio"), h("th", { scope: "col", title: "Entropy of the router's probabilities: 1 when it has no opinion" }, "Router"))),
        h("tbody", {}, ...this.rows.map((row) => row.element)),
      ));
    this.root.replaceChildren(
      h("p", { class: "fine" }, `${experts.n_routed_experts} experts in each of ${experts.layers.length} layers, ${experts.num_experts_per_tok} of them for every token${shared}.`),
      this.numbers,
      h("h3", {}, "Tokens"), this.strip,
      h("h3", {}, "Experts by layer"),
      this.buildLegend(), grid, this.detail, this.buildCache(),
    );
    this.root.style.setProperty("--row", `${Math.max(10, Math.min(26, Math.round(320 / experts.layers.length)))}px`);
    this.reset();
  }

  buildRow(layer, l) {
    const canvas = h("canvas", { role: "img" });
    canvas.addEventListener("pointermove", (e) => {
      const expert = Math.floor((e.offsetX / canvas.clientWidth) * this.count);
      this.cursor = { l, expert: Math.max(0, Math.min(this.count - 1, expert)) };
      this.draw();
    });
    const even = h("td"), violation = h("td", { class: "wide-only" }), router = h("td");
    return { canvas, even, violation, router, element: h("tr", {}, h("th", { scope: "row" }, String(layer)), h("td", { class: "grow" }, canvas), even, violation, router) };
  }

  buildLegend() {
    this.picked = h("span", { class: "pick", "aria-hidden": "true" });
    return h("p", { class: "legend fine" },
      h("span", { class: "key" }, "unused", h("span", { class: "ramp", "aria-hidden": "true" }), "3 × an even share"),
      h("span", { class: "key" }, this.picked, "picked for the chosen token"));
  }

  buildCache() {
    this.latentBar = h("span", { class: "fill" });
    this.latentText = h("span");
    this.fullText = h("span");
    this.cacheText = h("p", { class: "fine" });
    return h("section", { class: "cache", "aria-label": "Cache" },
      h("h3", {}, "Memory of the conversation"),
      h("div", { class: "meter" }, h("div", { class: "meter-line" }, h("span", {}, this.facts.experts || this.facts.model_type.startsWith("deepseek") ? "Latent cache, as it is" : "Cache, as it is"), this.latentText), h("div", { class: "track", "aria-hidden": "true" }, this.latentBar)),
      h("div", { class: "meter" }, h("div", { class: "meter-line" }, h("span", {}, "Full heads would take"), this.fullText), h("div", { class: "track", "aria-hidden": "true" }, h("span", { class: "fill full" }))),
      this.cacheText);
  }

  // ---- moving about

  select(index) {
    this.selected = Math.max(0, Math.min(this.tokens.length - 1, index));
    this.follow = this.selected === this.tokens.length - 1;
    this.draw();
  }

  stripKey(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || !this.tokens.length) return;
    event.preventDefault();
    this.select(this.selected + move);
  }

  gridKey(event) {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!move) return;
    event.preventDefault();
    const from = this.cursor ?? { l: 0, expert: -move[1] };
    this.cursor = {
      l: Math.max(0, Math.min(this.layers.length - 1, from.l + move[0])),
      expert: Math.max(0, Math.min(this.count - 1, from.expert + move[1])),
    };
    this.draw();
  }

  // ---- showing

  update() {
    if (!this.facts || !this.root.offsetParent) return;
    this.updateCache();
    if (!this.strip) return;
    this.updateStrip();
    const style = getComputedStyle(this.root);
    const stops = [0, 1, 2, 3, 4].map((i) => rgb(style.getPropertyValue(`--heat-${i}`)));
    const colours = { stops, pick: getComputedStyle(this.picked).borderTopColor, ink: style.color };
    const evenness = this.layers.map((_, l) => this.updateRow(l, colours));
    this.updateNumbers(evenness);
    // Read out when somebody moves about here, not with every token that comes.
    this.detail.setAttribute("aria-live", this.root.contains(document.activeElement) ? "polite" : "off");
    this.detail.textContent = this.describe();
  }

  updateStrip() {
    const hide = Math.max(0, this.tokens.length - MOST_TOKENS);
    while (this.strip.firstChild && Number(this.strip.firstChild.dataset.index) < hide) this.strip.firstChild.remove();
    const from = this.strip.lastChild ? Number(this.strip.lastChild.dataset.index) + 1 : hide;
    for (let i = from; i < this.tokens.length; i += 1) {
      const token = this.tokens[i];
      this.strip.append(h("span", { role: "option", id: `token-${i}`, "data-index": i, "aria-selected": "false", class: token.generated ? "chip answer" : "chip" }, visible(token.text)));
    }
    this.strip.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const chosen = this.strip.querySelector(`[data-index="${this.selected}"]`);
    if (chosen) {
      chosen.setAttribute("aria-selected", "true");
      this.strip.setAttribute("aria-activedescendant", chosen.id);
      const top = chosen.offsetTop;
      if (top < this.strip.scrollTop || top + chosen.offsetHeight > this.strip.scrollTop + this.strip.clientHeight) this.strip.scrollTop = top - this.strip.clientHeight / 2;
    } else this.strip.removeAttribute("aria-activedescendant");
    if (!this.tokens.length && !this.strip.firstChild) this.strip.dataset.empty = "Ask something, and its tokens appear here one by one.";
    else delete this.strip.dataset.empty;
  }

  updateRow(l, colours) {
    const { canvas, even, violation, router } = this.rows[l];
    const load = this.load[l], total = load.reduce((a, b) => a + b, 0);
    paintRow(canvas, load, total, this.tokens[this.selected], l, this.cursor?.l === l ? this.cursor.expert : -1, colours);
    let entropy = 0, most = 0;
    load.forEach((n) => { if (n) entropy -= (n / total) * Math.log(n / total); if (n > load[most]) most = load.indexOf(n); });
    const scale = Math.log(Math.max(2, this.count));
    const result = { even: entropy / scale, router: this.entropy[l] / Math.max(1, this.tokens.length) / scale, unused: load.filter((n) => !n).length, violation: total ? (load[most] * this.count) / total - 1 : 0 };
    even.textContent = total ? result.even.toFixed(2) : "–";
    violation.textContent = total ? result.violation.toFixed(2) : "–";
    router.textContent = total ? result.router.toFixed(2) : "–";
    canvas.setAttribute("aria-label", total ? `Busiest: expert ${most} with ${percent(load[most] / total)} of the picks; ${result.unused} unused` : "no tokens yet");
    return result;
  }

  updateNumbers(rows) {
    const mean = (name) => rows.reduce((sum, row) => sum + row[name], 0) / Math.max(1, rows.length);
    const some = this.tokens.length > 0;
    const unused = rows.reduce((sum, row) => sum + row.unused, 0);
    const entries = [
      ["Tokens seen", String(this.tokens.length)],
      ["Load evenness", some ? mean("even").toFixed(2) : "–"],
      ["Router entropy", some ? mean("router").toFixed(2) : "–"],
      ["Unused experts", some ? `${unused} of ${this.layers.length * this.count}` : "–"],
    ];
    this.numbers.replaceChildren(...entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  describe() {
    const token = this.tokens[this.selected];
    if (!this.cursor) {
      if (!token) return "";
      const ways = token.experts.map((picks, l) => `layer ${this.layers[l]}: ${picks.join(", ")}`);
      return `“${visible(token.text)}” at ${token.position} went to ${ways.slice(0, 8).join("; ")}${ways.length > 8 ? "; …" : ""}.`;
    }
    const { l, expert } = this.cursor;
    const load = this.load[l], total = load.reduce((a, b) => a + b, 0);
    const seen = `Layer ${this.layers[l]}, expert ${expert}: ${load[expert]} of ${this.tokens.length} tokens`;
    const share = total ? `, ${percent(load[expert] / total)} of the picks (an even share is ${percent(1 / this.count)})` : "";
    const rank = token ? token.experts[l].indexOf(expert) : -1;
    const here = rank < 0 ? "" : ` For “${visible(token.text)}” it is pick ${rank + 1}, with weight ${token.weights[l][rank].toFixed(3)}.`;
    return `${seen}${share}.${here}`;
  }

  updateCache() {
    const { bytes_per_token: latent, full_bytes_per_token: full, tokens, tokens_in_use: used } = this.facts.cache;
    const shown = Math.max(this.length ?? 0, 1);
    this.latentBar.style.width = `${Math.max(0.5, (100 * latent) / full)}%`;
    this.latentText.textContent = `${bytes(latent * shown)}`;
    this.fullText.textContent = `${bytes(full * shown)}`;
    const what = this.length ? `for the ${shown} tokens of this text` : "for each token";
    this.cacheText.textContent = `${(full / latent).toFixed(1)} times less, ${what}. The server holds ${used.toLocaleString("en")} of ${tokens.toLocaleString("en")} tokens.`;
  }
}

function paintRow(canvas, load, total, token, l, cursor, { stops, pick, ink }) {
  const ratio = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (!width || !height) return;
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const paint = canvas.getContext("2d");
  paint.clearRect(0, 0, width, height);
  const cell = width / load.length, gap = cell > 6 * ratio ? ratio : 0;
  const box = (i) => { const x = Math.round(i * cell); return [x, 0, Math.max(1, Math.round((i + 1) * cell) - x - gap), height]; };
  load.forEach((n, i) => {
    // 0, an even share, and three times that are the ends and a third of the way along the colours.
    paint.fillStyle = blend(stops, total ? Math.min(1, (n * load.length) / total / 3) : 0);
    paint.fillRect(...box(i));
  });
  const ring = (i, colour, thick) => {
    const [x, y, w, tall] = box(i);
    paint.strokeStyle = colour;
    paint.lineWidth = thick;
    paint.strokeRect(x + thick / 2, y + thick / 2, Math.max(1, w - thick), tall - thick);
  };
  const strongest = token ? Math.max(...token.weights[l], 1e-9) : 1;
  token?.experts[l].forEach((expert, k) => {
    paint.globalAlpha = 0.4 + 0.6 * (token.weights[l][k] / strongest);
    ring(expert, pick, Math.min(cell / 3, 2.5 * ratio));
    paint.globalAlpha = 1;
  });
  if (cursor >= 0) ring(cursor, ink, Math.min(cell / 3, 1.5 * ratio));
}

function blend(stops, t) {
  const at = t * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at)), part = at - i;
  return `rgb(${stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * part)).join(" ")})`;
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.trim().slice(i, i + 2), 16));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ /, "·") || "∅";
