"""The page of a server: one file of HTML,
CSS and plain JavaScript that asks for nothing but the server's own answers.
"""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src "
    "data:; base-uri 'none'; form-action 'none'"
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>PreQuant: one backbone, many tasks</title>
<style>
:root { color-scheme: light dark; --text: #1d2430; --soft: #566072; --line: #d5dae2; --edge: #7b8494;
  --panel: #f5f7fa; --page: #fff;
  --focus: #0b63b0; --bar: #3b87cc; --error: #a4161a; }
@media (prefers-color-scheme: dark) { :root { --text: #e7eaf0; --soft: #a5aebd; --line: #384151; --edge: #7f8999;
  --panel: #1d232d; --page: #13171e;
  --focus: #7db8f0; --bar: #3f7fbe; --error: #ff9a9d; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 58rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p {
  margin: .3rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
form { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  margin-top: 1.2rem; display: grid; gap: .9rem; }
label { display: block; font-weight: 600; margin-bottom: .25rem; }
select, textarea, button { font: inherit; color: inherit;
  background: var(--page); border: 1px solid var(--edge); border-radius: .35rem; padding: .45rem .6rem; }
select { min-width: 14rem; max-width: 100%; } textarea { width: 100%; min-height: 4.2rem; resize: vertical;
  display: block; }
button { cursor: pointer; padding: .45rem 1rem; } button.main { background: #0b63b0; border-color: #0b63b0;
  color: #fff; font-weight: 600; }
button:disabled { opacity: .55; cursor: default; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
#error { color: var(--error); font-weight: 600; margin: 0; } #error:empty { display: none; }
#answers { list-style: none; margin: 0; padding: 0; }
#answers > li { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin-bottom: .8rem; }
.texts { overflow-wrap: anywhere; white-space: pre-wrap; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 4; overflow: hidden; }
.answer { display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: .1rem 1rem; padding: .6rem 0 .2rem; }
.answer + .answer { border-top: 1px solid var(--line); margin-top: .5rem; }
.task { font-weight: 600; overflow-wrap: anywhere; } .bars { display: grid; gap: .25rem; }
.bar { display: grid; grid-template-columns: minmax(6.5rem, 9.5rem) 1fr 4.5rem; gap: .6rem; align-items: center;
  font-variant-numeric: tabular-nums; }
.bar span:first-child { overflow-wrap: anywhere; } .bar span:last-child { text-align: right; white-space: nowrap; }
  .best { font-weight: 600; }
.track { background: var(--line); border-radius: .2rem; height: .7rem; overflow: hidden; }
.fill { background: var(--bar); height: 100%; opacity: .5; } .best .fill { opacity: 1; }
[hidden] { display: none !important; }
@media (max-width: 36rem) { .answer { grid-template-columns: 1fr; } .bar { grid-template-columns: 1fr auto;
  row-gap: .1rem; }
  .track { grid-column: 1 / -1; grid-row: 2; } }
</style>
</head>
<body>
<main>
<h1>One backbone, many tasks</h1>
<p class="soft" id="status" role="status">Looking for the server …</p>
<form id="form">
  <div><label for="task">Task</label><select id="task" aria-describedby="about"></select>
    <p class="soft" id="about"></p></div>
  <div><label for="text">Text</label><textarea id="text" required></textarea></div>
  <div id="pair" hidden><label for="text-pair">Second text</label><textarea id="text-pair"></textarea></div>
  <div class="row"><button class="main" id="ask" disabled>Ask this task</button>
    <button type="button" id="ask-all" disabled>Ask every task that fits</button>
  <span class="soft">every task at once is one batch through one backbone</span></div>
  <p id="error" role="alert"></p>
</form>
<h2 id="answers-title" hidden>Answers</h2>
<ul id="answers" aria-labelledby="answers-title" aria-live="polite"></ul>
<noscript><p>This page needs JavaScript; POST /predict does not.</p></noscript>
</main>
<script>
"use strict";
const KEPT = 20;
const at = (id) => document.getElementById(id);
let tasks = [];

function make(kind, className, text) {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body) };
  let response;
  try { response = await fetch(path, options); } catch { throw new Error("The server does not answer."); }
  const found = await response.json().catch(() => ({}));
  const said = typeof found.detail === "string" ? found.detail : `The server answered ${response.status}.`;
  if (!response.ok) throw new Error(said);
  return found;
}

const chosen = () => tasks.find((task) => task.name === at("task").value);
const takes = (task, texts) => task.num_texts === null || task.num_texts === texts;

function showTask() {
  const task = chosen();
  at("pair").hidden = !task || task.num_texts === 1;
  at("text-pair").required = !!task && task.num_texts === 2;
  const facts = task && [
    task.labels.length ? task.labels.join(" / ") : "a score",
    task.num_texts === 2 ? "compares two texts" : "",
    `up to ${task.max_length} tokens`,
    task.data === "synthetic" ? "trained on a generated task" : "",
    task.score && isFinite(task.score) ? `${(100 * task.score).toFixed(1)} in its validation` : "",
  ].filter(Boolean);
  at("about").textContent = facts ? facts.join(" · ") : "";
}

async function refresh() {
  try {
    tasks = (await ask("/tasks")).tasks;
    const before = at("task").value;
    at("task").replaceChildren(...tasks.map((task) => new Option(task.name, task.name)));
    if (tasks.some((task) => task.name === before)) at("task").value = before;
    const count = `${tasks.length} task${tasks.length === 1 ? "" : "s"}`;
    at("status").textContent = `${count} on one 4-bit backbone: outlier weights and a head each.`;
  } catch (error) {
    at("status").textContent = error.message;
  }
  at("ask").disabled = at("ask-all").disabled = !tasks.length;
  showTask();
}

function bar(label, share, isBest) {
  const line = make("div", isBest ? "bar best" : "bar"), track = make("span", "track"), fill = make("span", "fill");
  fill.style.display = "block";
  fill.style.width = `${100 * share}%`;
  track.append(fill);
  track.setAttribute("aria-hidden", "true");
  line.append(make("span", "", label), track, make("span", "", `${(100 * share).toFixed(1)} %`));
  return line;
}

function showAnswer(answer) {
  const line = make("div", "answer"), bars = make("div", "bars");
  line.dataset.task = answer.task;
  for (const [label, share] of Object.entries(answer.probabilities || {}))
    bars.append(bar(label, share, label === answer.label));
  else bars.append(make("div", "best", `score ${answer.score.toFixed(3)}`));
  if (answer.is_cut) bars.append(make("p", "soft", `cut after ${answer.tokens} tokens`));
  line.append(make("div", "task", answer.task), bars);
  return line;
}

function show(query, answers, milliseconds) {
  const item = make("li"), batches = new Set(answers.map((answer) => JSON.stringify(answer.batch)));
  item.append(make("div", "texts", query.text_pair ? `${query.text}\\n${query.text_pair}` : query.text));
  for (const answer of answers) item.append(showAnswer(answer));
  const inBatches = [...batches].map((text) => {
    const { rows, tasks } = JSON.parse(text);
    const owners = tasks.length === 1 ? "one task" : `${tasks.length} tasks`;
    return `a batch of ${rows} text${rows === 1 ? "" : "s"} for ${owners}`;
  });
  const { queue, model } = answers[0].milliseconds;
  const parts = `${queue.toFixed(1)} ms in the queue, ${model.toFixed(1)} ms in the model`;
  const times = `${milliseconds.toFixed(0)} ms: ${parts}`;
  item.append(make("p", "soft batch", `${times}, in ${inBatches.join(" and ")}`));
  at("answers").prepend(item);
  while (at("answers").children.length > KEPT) at("answers").lastChild.remove();
  at("answers-title").hidden = false;
}

async function send(wantsAll) {
  const pair = at("pair").hidden ? "" : at("text-pair").value;
  const query = { text: at("text").value, ...(pair && { text_pair: pair }) };
  const names = wantsAll ? tasks.filter((task) => takes(task, pair ? 2 : 1)).map((task) => task.name) : [chosen().name];
  at("error").textContent = "";
  at("ask").disabled = at("ask-all").disabled = true;
  const begin = performance.now();
  try {
    show(query, await ask("/predict", names.map((task) => ({ task, ...query }))), performance.now() - begin);
  } catch (error) {
    at("error").textContent = error.message;
    await refresh();
  }
  at("ask").disabled = at("ask-all").disabled = !tasks.length;
}

at("task").addEventListener("change", showTask);
at("form").addEventListener("submit", (event) => { event.preventDefault(); send(false); });
at("ask-all").addEventListener("click", () => { if (at("form").reportValidity()) send(true); });
refresh();
</script>
</body>
</html>
"""
