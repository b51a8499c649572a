// The playground: text in, more text out, or what belongs between two texts.

import { $, announce, catchFocus, eachFrame, notice } from "./dom.js";
import { stream } from "./api.js";
import { follow } from "./chat.js";

export class Complete {
  constructor(app) {
    this.app = app;
    this.running = null;
    $("completion").addEventListener("submit", (e) => { e.preventDefault(); this.run(); });
    $("complete-stop").addEventListener("click", () => this.stop());
    $("complete-take").addEventListener("click", () => this.take());
    $("fim").addEventListener("toggle", () => this.name());
    $("completion").addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); this.run(); } });
  }

  get suffix() { return $("fim").open ? $("suffix").value : ""; }

  name() { $("complete-send").textContent = $("fim").open ? "Fill the gap" : "Continue the text"; }

  stop() { this.running?.abort(); }

  async run() {
    const prompt = $("prompt").value;
    if (this.running || !prompt) return;
    notice("");
    const { app } = this;
    const facts = (this.suffix && app.facts?.code) || app.facts;
    if (facts) app.experts.setFacts(facts);
    const body = {
      model: facts?.model, prompt, max_tokens: 128, ...app.sampling(facts), stream_options: { include_usage: true },
      ...(this.suffix ? { suffix: this.suffix } : {}), ...(facts?.experts ? { routing: true } : {}),
    };
    let text = "";
    const result = $("result");
    result.textContent = "";
    $("result-facts").textContent = "";
    this.busy(new AbortController());
    announce("Writing");
    const paint = eachFrame(() => { result.textContent = text; result.scrollTop = result.scrollHeight; });
    const done = await follow(stream("/v1/completions", body, this.running.signal), app, (choice) => { text += choice.text ?? ""; paint(); }, () => this.run());
    result.textContent = text;
    $("result-facts").textContent = [facts === app.facts?.code && facts?.model, done.facts].filter(Boolean).join(": ");
    this.busy(null);
    $("complete-take").disabled = !text;
    announce(done.error ?? `${done.stopped ? "Stopped." : "Result:"} ${text.slice(0, 800)}`);
  }

  take() {
    $("prompt").value += $("result").textContent + this.suffix;
    $("suffix").value = "";
    $("result").textContent = "";
    $("complete-take").disabled = true;
    $("prompt").focus();
  }

  busy(controller) {
    this.running = controller;
    $("complete-send").hidden = Boolean(controller);
    $("complete-stop").hidden = !controller;
    catchFocus($(controller ? "complete-stop" : "complete-send"));
  }
}
