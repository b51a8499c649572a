// Light colouring of code, the same for every language: comments, strings, numbers, and words that many languages keep.

import { h } from "./dom.js";

const WORDS = new Set(("abstract and as assert async await base bool boolean break case catch char class const constexpr continue def default "
  + "defer del do double elif else enum except export extends extern false False final finally float fn for from func function global go if impl "
  + "implements import in include int interface is lambda let long match mod module mut namespace new nil None not null nullptr or override package "
  + "pass print private protected pub public raise return self short signed sizeof static str string struct super switch template this throw throws "
  + "trait true True try type typedef typename typeof undefined union unsafe unsigned use using var virtual void volatile where while with yield "
  + "select insert update delete from where join on group by order having create table values into set").split(" "));
const HASH = /^(|py|python|sh|bash|shell|ruby|rb|yaml|yml|toml|r|perl|make|makefile|dockerfile|text|jl|julia)$/i;
const TOKEN = /("""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*`?)|(\/\/.*|\/\*[\s\S]*?(?:\*\/|$)|#.*|--\s.*)|(\b\d[\w.]*\b)|([A-Za-z_]\w*)/g;
const MAX = 40000;

export function paint(element, text, language) {
  if (text.length > MAX || /^(text|txt|plain|md|markdown)$/i.test(language)) { element.textContent = text; return; }
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(TOKEN)) {
    const [whole, string, comment, number, word] = match;
    if (comment?.startsWith("#") && !HASH.test(language)) continue;
    if (comment?.startsWith("--") && !/^(sql|lua|haskell|hs|ada|elm)$/i.test(language)) continue;
    if (comment?.startsWith("//") && /^(py|python|sh|bash|shell|ruby|rb)$/i.test(language)) continue;
    const kind = string !== undefined ? "s" : comment !== undefined ? "c" : number !== undefined ? "n" : WORDS.has(word) ? "k" : null;
    if (!kind) continue;
    parts.push(text.slice(at, match.index), h("span", { class: `tok-${kind}` }, whole));
    at = match.index + whole.length;
  }
  parts.push(text.slice(at));
  element.replaceChildren(...parts);
}
