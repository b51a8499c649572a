// Markdown to elements. Every piece of text becomes a text node, so nothing in it can become markup; links are made only
// for http, https and mailto, and pictures are links, because a picture would be a request to somebody else.

import { copyText, h } from "./dom.js";
import { paint } from "./code.js";

const SAFE = /^(https?:\/\/|mailto:)/i;
const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const TABLE_LINE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;

const MAX_DEPTH = 20; // lists and quotes inside each other; beyond it their marks are text, or the browser's stack would end

/** Splits a text into blocks; each is {kind, lines, depth, …}. An open fence at the end counts as one: text may still stream. */
export function blocks(text, depth = 0) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  if (depth > MAX_DEPTH) return [{ kind: "paragraph", lines, depth }];
  const out = [];
  let at = 0;
  const take = (kind, count, more = {}) => { out.push({ kind, lines: lines.slice(at, at + count), depth, ...more }); at += count; };
  const run = (test) => { let n = 0; while (at + n < lines.length && test(lines[at + n], n)) n += 1; return n; };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    const head = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*$/);
    if (!line.trim()) at += 1;
    else if (fence) {
      let n = 1;
      while (at + n < lines.length && !(lines[at + n].trim().startsWith(fence[1]) && !lines[at + n].trim().replace(/^[`~]+/, ""))) n += 1;
      const body = lines.slice(at + 1, at + n);
      take("code", Math.min(n + 1, lines.length - at), { language: fence[2], body: body.join("\n") });
    } else if (head) take("heading", 1, { level: head[1].length, text: head[2] });
    else if (RULE.test(line)) take("rule", 1);
    else if (/^ {0,3}>/.test(line)) take("quote", run((l) => /^ {0,3}>/.test(l) || (l.trim() && !startsBlock(l))));
    else if (ITEM.test(line)) take("list", run((l, n) => ITEM.test(l) || /^\s{2,}\S/.test(l) || (!l.trim() && continues(lines, at + n))));
    else if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")) take("table", 2 + countRows(lines, at + 2));
    else take("paragraph", Math.max(1, run((l, n) => l.trim() && (n === 0 || !startsBlock(l)))));
  }
  return out;
}

const startsBlock = (l) => FENCE.test(l) || /^ {0,3}(#{1,6}\s|>)/.test(l) || ITEM.test(l) || RULE.test(l);
const continues = (lines, at) => { const next = lines[at + 1] ?? ""; return ITEM.test(next) || /^\s{2,}\S/.test(next); };
function countRows(lines, from) { let n = 0; while (lines[from + n]?.includes("|")) n += 1; return n; }

/** The elements of one block. */
export function renderBlock(block) {
  switch (block.kind) {
    case "code": return codeBlock(block.language, block.body);
    // The page has h1 and h2 of its own: an answer's headings start below them.
    case "heading": return h(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule": return h("hr");
    case "quote": return h("blockquote", {}, ...renderAll(block.lines.map((l) => l.replace(/^ {0,3}> ?/, "")).join("\n"), block.depth + 1));
    case "list": return list(block);
    case "table": return table(block.lines);
    default: return h("p", {}, ...inline(block.lines.map((l) => l.trim()).join("\n")));
  }
}

const renderAll = (text, depth) => blocks(text, depth).map(renderBlock);

/** Brings `element` up to date with a text that grows: blocks that did not change stay. */
export function render(element, text) {
  const fresh = blocks(text);
  const old = element.shown ?? [];
  let same = 0;
  while (same < fresh.length && same < old.length && old[same] === source(fresh[same])) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...fresh.slice(same).map(renderBlock));
  element.shown = fresh.map(source);
}

const source = (block) => `${block.kind} ${block.lines.join("\n")}`;

function codeBlock(language, body) {
  const code = h("code", {});
  paint(code, body, language);
  const copy = h("button", { type: "button", class: "quiet small", onclick: () => copyText(body, copy) }, "Copy");
  copy.setAttribute("aria-label", `Copy code${language ? ` (${language})` : ""}`);
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language || "text"), copy), h("pre", { tabindex: "0", role: "group", "aria-label": `${language || "text"} code` }, code));
}

function list({ lines, depth }) {
  const base = lines[0].match(ITEM)[1].length;
  const ordered = /\d/.test(lines[0].match(ITEM)[2]);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= base + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(new RegExp(`^ {0,${base + (ordered ? 3 : 2)}}`), ""));
  }
  const start = ordered ? parseInt(lines[0].trim(), 10) : null;
  return h(ordered ? "ol" : "ul", { start: start === 1 ? null : start }, ...items.map((item) => {
    const inner = renderAll(item.join("\n"), depth + 1);
    const tight = inner[0]?.tagName === "P" ? [...inner[0].childNodes, ...inner.slice(1)] : inner;
    return h("li", {}, ...tight);
  }));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const head = cells(lines[0]);
  const row = (line, tag) => h("tr", {}, ...head.map((_, i) => h(tag, tag === "th" ? { scope: "col" } : {}, ...inline(cells(line)[i] ?? ""))));
  return h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

// In the order in which they win: code first, since nothing inside it means anything else.
const INLINE = [
  [/^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, (m) => h("code", {}, m[2].trim() || m[2])],
  [/^\\([\\`*_{}[\]()#+\-.!|~<>])/, (m) => m[1]],
  [/^!?\[([^\]]*)\]\(\s*<?([^\s)>]*)>?(?:\s+["'][^"')]*["'])?\s*\)/, (m) => link(m[2], m[1], m[0])],
  [/^<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>/i, (m) => link(m[1], m[1], m[0])],
  [/^https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"]/i, (m) => link(m[0], m[0], m[0])],
  [/^(\*\*|__)(?=\S)([\s\S]*?\S)\1/, (m) => h("strong", {}, ...inline(m[2]))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m) => h("del", {}, ...inline(m[1]))],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (m) => h("em", {}, ...inline(m[1]))],
  [/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/, (m, before) => (/\w$/.test(before) ? null : h("em", {}, ...inline(m[1])))],
  [/^ {2,}\n/, () => h("br")],
];
const SPECIAL = /[`\\![<*_~\n]| {2}|h(?=ttps?:)/;
const MAX_INLINE = 20000; // beyond it a paragraph is shown as it is: patterns that search ahead would take long

export function inline(text) {
  if (text.length > MAX_INLINE) return [text];
  const out = [];
  let plain = "";
  let at = 0;
  const flush = () => { if (plain) out.push(plain); plain = ""; };
  while (at < text.length) {
    const rest = text.slice(at);
    const skip = rest.search(SPECIAL);
    if (skip !== 0) { const n = skip < 0 ? rest.length : skip; plain += rest.slice(0, n); at += n; continue; }
    let found = null;
    for (const [pattern, make] of INLINE) {
      const match = rest.match(pattern);
      const made = match && make(match, text.slice(0, at));
      if (made !== null && made !== undefined) { found = [match[0].length, made]; break; }
    }
    if (!found) { plain += rest[0]; at += 1; continue; }
    at += found[0];
    if (typeof found[1] === "string") plain += found[1];
    else { flush(); out.push(found[1]); }
  }
  flush();
  return out;
}

function link(address, text, whole) {
  if (!SAFE.test(address)) return whole;
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, text || address);
}
