// Asks the model, and shows the reply word by word. Texts are set as text, never as HTML.
"use strict";

const [talk, form, question, send] = ["talk", "form", "question", "send"].map((id) => document.getElementById(id));

function say(text, kind) {
  const line = document.createElement("li");
  line.className = kind;
  line.textContent = text;
  talk.append(line);
  line.scrollIntoView();
  return line;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || send.disabled) return;
  say(text, "asked");
  question.value = "";
  send.disabled = true;
  const line = say("", "told");
  const query = new URLSearchParams({ text_input: text, max_tokens: "64" });
  const source = new EventSource(`/v2/models/service/generate_stream?${query}`);
  const end = (problem) => {
    source.close();
    send.disabled = false;
    question.focus();
    if (problem) line.classList.add("failed");
    if (problem && !line.textContent) line.textContent = problem;
  };
  source.onmessage = (message) => {
    const said = JSON.parse(message.data);
    if (said.error) return end(said.error);
    line.textContent += said.text_output;
    line.scrollIntoView();
    if (said.details) end();
  };
  source.onerror = () => end("That did not work. The question may be too long; please try again.");
});
