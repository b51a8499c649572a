// What this browser remembers: conversations and settings. A full or forbidden storage costs memory only.

const CONVERSATIONS = "shoal.conversations";
const SETTINGS = "shoal.settings";

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const isMessage = (m) => m && ["user", "assistant"].includes(m.role) && typeof m.content === "string";
const isConversation = (c) => c && typeof c.id === "string" && Array.isArray(c.messages) && c.messages.every(isMessage);

export function loadConversations() {
  const kept = read(CONVERSATIONS, []);
  return Array.isArray(kept) ? kept.filter(isConversation) : [];
}

export const saveConversations = (list) => write(CONVERSATIONS, list.filter((c) => c.messages.length || c.system));
/** Calls f when another tab has saved its conversations. */
export const whenSavedElsewhere = (f) => addEventListener("storage", (e) => { if (e.key === CONVERSATIONS) f(); });

export const loadSettings = () => ({ theme: "", sampling: {}, ...read(SETTINGS, {}) });
export const saveSettings = (settings) => write(SETTINGS, settings);

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), system: "", messages: [] };
}

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  const line = first?.content.trim().split("\n")[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 60)}…` : line || "New conversation";
}
