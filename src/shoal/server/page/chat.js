// The conversation: messages, the composer, and one answer at a time.

import { $, announce, catchFocus, copyText, eachFrame, h, notice } from "./dom.js";
import { stream } from "./api.js";
import { render } from "./markdown.js";

export class Chat {
  /** `app` has settings, facts, experts; onChange is called when the conversation is to be kept. */
  constructor(app, onChange) {
    this.app = app;
    this.onChange = onChange;
    this.running = null;
    $("composer").addEventListener("submit", (e) => { e.preventDefault(); this.send(); });
    $("stop").addEventListener("click", () => this.stop());
    const box = $("question");
    box.addEventListener("input", () => grow(box));
    box.addEventListener("keydown", (e) => {
      if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); this.send(); }
    });
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.show();
    $("messages").scrollTop = $("messages").scrollHeight;
  }

  show() {
    const { messages } = this.conversation;
    const shown = messages.map((message, index) => this.element(message, index));
    $("messages").replaceChildren(...(shown.length ? shown : [this.welcome()]));
  }

  welcome() {
    const start = (text) => h("button", { type: "button", class: "suggestion", onclick: () => { $("question").value = text; grow($("question")); $("question").focus(); } }, text);
    return h("div", { class: "welcome" },
      h("h2", {}, "What would you like to know?"),
      h("p", {}, "The model runs on this machine. Nothing you write leaves it."),
      h("div", { class: "suggestions" }, start("What is the capital of France?"), start("Write a Python function that reverses a list."), start("Explain what a mixture of experts is.")));
  }

  element(message, index) {
    const mine = message.role === "user";
    const body = h("div", { class: "body" });
    if (mine) body.textContent = message.content;
    else render(body, message.content);
    const reasoning = message.reasoning ? h("details", { class: "reasoning" }, h("summary", {}, "Reasoning"), h("div", { class: "body" }, message.reasoning)) : null;
    const copy = h("button", { type: "button", class: "quiet small", onclick: () => copyText(message.content, copy) }, "Copy");
    const again = mine
      ? h("button", { type: "button", class: "quiet small", onclick: () => this.edit(index) }, "Edit")
      : h("button", { type: "button", class: "quiet small", onclick: () => this.regenerate(index) }, "Regenerate");
    const facts = h("span", { class: "fine" }, message.facts ?? "");
    return h("article", { class: `message ${message.role}`, "aria-label": mine ? "You" : "Answer" },
      h("h2", { class: "who" }, mine ? "You" : this.app.facts?.model ?? "Model"), reasoning, body, h("div", { class: "actions" }, copy, again, facts));
  }

  send() {
    const box = $("question"), text = box.value.trim();
    if (!text || this.running) return;
    box.value = "";
    grow(box);
    this.conversation.messages.push({ role: "user", content: text });
    this.answer();
  }

  regenerate(index) {
    if (this.running) return;
    this.conversation.messages.length = index;
    this.answer();
  }

  edit(index) {
    if (this.running) return;
    const message = this.conversation.messages[index], article = $("messages").children[index];
    const area = h("textarea", { "aria-label": "Edit the message", rows: "3" });
    area.value = message.content;
    const back = () => { this.show(); $("messages").children[index]?.querySelectorAll(".actions button")[1]?.focus(); };
    const form = h("form", { class: "edit", onsubmit: (e) => {
      e.preventDefault();
      const text = area.value.trim();
      if (!text) return;
      this.conversation.messages.length = index;
      this.conversation.messages.push({ role: "user", content: text });
      this.answer();
    } }, area, h("div", { class: "row" }, h("button", { class: "primary" }, "Send again"), h("button", { type: "button", class: "quiet", onclick: back }, "Cancel")));
    area.addEventListener("keydown", (e) => { if (e.key === "Escape") { e.stopPropagation(); back(); } });
    article.replaceChildren(h("h2", { class: "who" }, "You"), form);
    grow(area);
    area.focus();
  }

  stop() {
    this.running?.abort();
  }

  async answer() {
    const { conversation, app } = this;
    const reply = { role: "assistant", content: "" };
    const body = {
      model: app.facts?.model,
      messages: [
        ...(conversation.system ? [{ role: "system", content: conversation.system }] : []),
        ...conversation.messages.map(({ role, content }) => ({ role, content })),
      ],
      ...app.sampling(),
      stream_options: { include_usage: true },
      ...(app.facts?.experts ? { routing: true } : {}),
    };
    conversation.messages.push(reply);
    if (app.facts) app.experts.setFacts(app.facts);
    this.show();
    this.busy(new AbortController());
    notice("");
    announce("Answering");
    const article = $("messages").lastChild;
    article.classList.add("writing");
    const paint = eachFrame(() => this.paint(article, reply));
    const take = (choice) => {
      reply.content += choice.delta?.content ?? "";
      if (choice.delta?.reasoning_content) reply.reasoning = (reply.reasoning ?? "") + choice.delta.reasoning_content;
      paint();
    };
    const again = () => {
      const at = conversation.messages.indexOf(reply); // gone if nothing of it had come
      if (this.conversation === conversation && !this.running) this.regenerate(at < 0 ? conversation.messages.length : at);
    };
    const done = await follow(stream("/v1/chat/completions", body, this.running.signal), app, take, again);
    reply.facts = done.facts;
    if (!reply.content && !reply.reasoning) conversation.messages.splice(conversation.messages.indexOf(reply), 1);
    this.busy(null);
    if (this.conversation === conversation) { this.keepPlace(() => this.show()); catchFocus($("question")); }
    announce(done.error ?? `${done.stopped ? "Stopped." : "Answer:"} ${reply.content.slice(0, 800)}`);
    this.onChange();
  }

  paint(article, reply) {
    this.keepPlace(() => {
      if (reply.reasoning) {
        if (!article.querySelector(".reasoning")) article.querySelector(".body").before(h("details", { class: "reasoning", open: true }, h("summary", {}, "Reasoning"), h("div", { class: "body" })));
        article.querySelector(".reasoning .body").textContent = reply.reasoning;
      }
      render(article.querySelector(":scope > .body"), reply.content);
    });
  }

  /** Stay at the end if that is where the reader is, and nowhere else. */
  keepPlace(change) {
    const box = $("messages"), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80, top = box.scrollTop;
    change();
    box.scrollTop = atEnd ? box.scrollHeight : top;
  }

  busy(controller) {
    this.running = controller;
    $("send").hidden = Boolean(controller);
    $("stop").hidden = !controller;
    $("messages").setAttribute("aria-busy", controller ? "true" : "false");
  }
}

/** Reads a stream to its end: choices go to `take`, routing to the experts; says what to show beside the text. A failure
 * is shown, with the offer to do it `again`. */
export async function follow(events, app, take, again) {
  let usage = null, timings = null, tokens = 0;
  const facts = () => {
    const count = usage?.completion_tokens ?? tokens;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    return `${count} token${count === 1 ? "" : "s"}${timings && count > 1 ? `, ${timings.predicted_per_second.toFixed(0)} a second` : ""}${cached ? `, ${cached} of the prompt from the cache` : ""}`;
  };
  app.experts.reset();
  try {
    for await (const event of events) {
      if (event.usage) { usage = event.usage; app.experts.setLength(usage.total_tokens); }
      timings = event.timings ?? timings;
      if (event.routing) app.experts.add(event.routing);
      for (const choice of event.choices ?? []) {
        if (choice.text || choice.delta?.content || choice.delta?.reasoning_content) tokens += 1;
        take(choice);
      }
    }
    app.refresh();
    return { facts: facts() };
  } catch (error) {
    app.refresh();
    if (error.name === "AbortError") return { stopped: true, facts: `${facts()}, stopped` };
    const text = error.status === 401 ? "The server wants an API key: enter it in the settings." : error instanceof TypeError ? "The server cannot be reached." : error.message;
    notice(text, again);
    return { error: text, facts: tokens ? facts() : "" };
  }
}

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight / 3)}px`;
}
