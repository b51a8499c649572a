// Puts the page together: views, conversations, settings, and what the server says of itself.

import { $, announce, h, notice } from "./dom.js";
import { getJson, key } from "./api.js";
import { Chat } from "./chat.js";
import { Complete } from "./complete.js";
import { ExpertView } from "./experts.js";
import { loadConversations, loadSettings, newConversation, saveConversations, saveSettings, titleOf, whenSavedElsewhere } from "./store.js";

// name, what it is called, bounds, step: the server checks again.
const SAMPLING = [
  ["temperature", "Temperature", 0, 100, 0.1],
  ["top_p", "Top p", 0, 1, 0.05],
  ["top_k", "Top k", 0, 1000000, 1],
  ["min_p", "Min p", 0, 1, 0.01],
  ["max_tokens", "Most tokens", 1, 1000000, 1],
  ["seed", "Seed", 0, 9007199254740991, 1],
];
const settings = loadSettings();
let waiting = 0, refusedKey = null;
let conversations = loadConversations();

const app = {
  facts: null,
  experts: new ExpertView($("experts-body")),
  sampling(facts = app.facts) {
    // Greedy where nobody says anything, as `shoal chat` does; other models recommend their own.
    const given = facts?.temperature === null ? { temperature: 0, ...settings.sampling } : settings.sampling;
    return Object.fromEntries(SAMPLING.map(([name]) => [name, given[name]]).filter(([, value]) => typeof value === "number" && Number.isFinite(value)));
  },
  async refresh() {
    try {
      app.facts = await getJson("/v1/shoal");
    } catch (error) {
      if (error.status === 401) askForKey();
      else if (error.status === 503) { $("model").textContent = "loading…"; clearTimeout(waiting); waiting = setTimeout(() => app.refresh(), 1500); } else if ($("notice").hidden) notice("The server cannot be reached.");
      return;
    }
    const { model, code, chat, temperature } = app.facts;
    $("model").textContent = model;
    $("set-temperature").placeholder = temperature === null ? "0" : "model's own";
    $("fim-note").textContent = code ? `${code.model} fills the gap.` : "Needs a model that was trained for it; the server says so if this one was not.";
    document.querySelector("[data-view=chat]").disabled = !chat; // a model that was only taught to go on with texts
    if (!chat) show("complete");
    app.experts.setFacts(code && app.experts.facts?.model === code.model ? code : app.facts);
  },
};

const chat = new Chat(app, keep);
const complete = new Complete(app);

// ---- conversations

let current = newConversation();

function keep() {
  if (current.messages.length && !conversations.includes(current)) conversations.unshift(current);
  if (!saveConversations(conversations)) notice("This browser's storage is full or off: conversations will be gone when the tab closes.");
  list();
}

function list() {
  $("conversations").replaceChildren(...conversations.map((conversation) => {
    const title = titleOf(conversation);
    return h("li", { class: conversation === current ? "current" : null },
      h("button", { type: "button", class: "title", "aria-current": conversation === current ? "true" : null, onclick: () => open(conversation) }, title),
      h("button", { type: "button", class: "icon-button remove", "aria-label": `Delete ${title}`, onclick: () => remove(conversation) }, "✕"));
  }));
}

/** What another tab saved is ours too, or the next save here would undo it; the conversation on show stays as it is. */
function takeOver() {
  conversations = loadConversations().map((one) => (one.id === current.id ? current : one));
  if (current.messages.length && !conversations.includes(current)) conversations.unshift(current);
  list();
}

function open(conversation) {
  current = conversation;
  $("system").value = current.system ?? "";
  chat.open(current);
  show("chat");
  list();
  showList(false);
  $("question").focus();
}

function remove(conversation) {
  if (!confirm(`Delete “${titleOf(conversation)}”?`)) return;
  conversations = conversations.filter((one) => one !== conversation);
  saveConversations(conversations);
  announce("Deleted");
  if (conversation === current) open(newConversation());
  else list();
  $("new-chat").focus();
}

// ---- views

function show(view) {
  for (const tab of document.querySelectorAll("[data-view]")) {
    if (tab.dataset.view === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
    $(tab.dataset.view).hidden = tab.dataset.view !== view;
  }
}

function showList(wanted) {
  document.body.classList.toggle("with-list", wanted);
  $("open-list").setAttribute("aria-expanded", String(wanted));
  if (wanted) $("new-chat").focus();
}

function showExperts(wanted) {
  $("experts").hidden = !wanted;
  $("toggle-experts").setAttribute("aria-expanded", String(wanted));
  document.body.classList.toggle("with-experts", wanted);
  settings.experts = wanted;
  saveSettings(settings);
  app.experts.draw();
}

// ---- settings

function openSettings(focus) {
  if (!$("settings").open) $("settings").showModal();
  focus?.focus();
}

/** Opens the settings once for each key that is refused: who closes them without another may look around. */
function askForKey() {
  notice("The server wants an API key.");
  if (refusedKey === key.get()) return;
  refusedKey = key.get();
  openSettings($("key"));
}

function theme(name) {
  settings.theme = name;
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  app.experts.draw();
}

function buildSettings() {
  $("sampling").replaceChildren(...SAMPLING.map(([name, title, low, high, step]) => {
    const input = h("input", { id: `set-${name}`, type: "number", min: low, max: high, step: "any", inputmode: "decimal", "data-step": step, placeholder: "model's own" });
    input.value = settings.sampling[name] ?? "";
    input.addEventListener("input", () => {
      const value = input.valueAsNumber, whole = step !== 1 || Number.isInteger(value);
      const bad = input.value !== "" && !(value >= low && value <= high && whole);
      input.setAttribute("aria-invalid", String(bad));
      if (input.value === "" || bad) delete settings.sampling[name];
      else settings.sampling[name] = value;
      saveSettings(settings);
    });
    return h("div", {}, h("label", { for: input.id }, title), input);
  }));
  for (const radio of document.querySelectorAll("[name=theme]")) {
    radio.checked = radio.value === settings.theme;
    radio.addEventListener("change", () => { theme(radio.value); saveSettings(settings); });
  }
  $("key").value = key.get();
  $("key").addEventListener("change", () => key.set($("key").value.trim()));
  $("system").addEventListener("input", () => { current.system = $("system").value; });
  $("settings").addEventListener("close", () => {
    key.set($("key").value.trim());
    notice("");
    if (conversations.includes(current)) keep();
    app.refresh();
  });
}

// ---- begin

for (const tab of document.querySelectorAll("[data-view]")) tab.addEventListener("click", () => show(tab.dataset.view));
$("new-chat").addEventListener("click", () => open(newConversation()));
$("open-list").addEventListener("click", () => showList(!document.body.classList.contains("with-list")));
$("toggle-experts").addEventListener("click", () => { showExperts($("experts").hidden); if (!$("experts").hidden && !$("close-experts").offsetParent) return; if (!$("experts").hidden) $("close-experts").focus(); });
$("close-experts").addEventListener("click", () => { showExperts(false); $("toggle-experts").focus(); });
$("open-settings").addEventListener("click", () => openSettings());
whenSavedElsewhere(takeOver);
$("main").addEventListener("click", () => showList(false));
document.addEventListener("keydown", (e) => {
  if (e.key !== "Escape" || $("settings").open) return;
  chat.stop();
  complete.stop();
  showList(false);
});
theme(settings.theme);
buildSettings();
show("chat");
chat.open(current);
list();
showExperts(settings.experts ?? innerWidth > 1100);
app.refresh();
