// The form that enqueues a job, and the curl command that does the same.

import { Mistake, Problem, hasKey, send, urlOf } from "./api.js";
import { el, setText } from "./elements.js";
import { $, announce, complain, short } from "./page.js";
import { hasFields, makeForm } from "./payload_form.js";

let functions = [];
let form = null;
const written = new Map(); // the JSON that the person typed, by function

const chosen = () => functions.find((each) => each.name === $("function").value);
const isJson = () => $("enqueue-form").elements.mode.value === "json";

function showFunction() {
  const found = chosen();
  setText($("function-description"), found?.description ?? "");
  const schema = found?.payload_schema ?? {};
  form = hasFields(schema) ? makeForm(schema) : null;
  $("mode").hidden = form === null;
  $("enqueue-form").elements.mode.value = form === null ? "json" : "fields";
  $("fields").replaceChildren(...(form ? [form.element] : []));
  $("json").value = written.get(found?.name) ?? (form ? "" : '{"hello": "world"}');
  showMode();
}

function showMode() {
  $("fields").hidden = isJson();
  $("json-field").hidden = !isJson();
  showCurl();
}

/** Read the payload as JSON text. Throws a Mistake that says what is wrong. */
function payload() {
  if (!isJson()) return form.read();
  const text = $("json").value;
  try {
    JSON.parse(text);
  } catch (error) {
    throw new Mistake(`The payload is not JSON: ${error.message}`);
  }
  return text;
}

function enqueuePath() {
  const query = new URLSearchParams();
  for (const name of ["delay", "retries", "timeout", "queue"]) {
    const value = $(`option-${name}`).value.trim();
    if (value) query.set(name, value);
  }
  return `/enqueue/${encodeURIComponent(chosen()?.name ?? "")}${query.size ? `?${query}` : ""}`;
}

function showCurl() {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  let text;
  try {
    text = payload();
  } catch {
    text = "PAYLOAD";
  }
  const lines = [`curl -X POST ${quote(urlOf(enqueuePath()).href)}`, `-H 'Content-Type: application/json'`];
  if (hasKey()) lines.push('-H "Authorization: Bearer $API_KEY"');
  lines.push(`-d ${quote(text)}`);
  setText($("curl"), lines.join(" \\\n  "));
}

$("function").addEventListener("change", showFunction);
$("mode").addEventListener("change", () => {
  if (isJson() && !written.has(chosen().name)) {
    try {
      $("json").value = JSON.stringify(JSON.parse(form.read()), null, 2);
    } catch {
      $("json").value = "{}";
    }
  }
  showMode();
});
$("json").addEventListener("input", () => written.set(chosen().name, $("json").value));
$("enqueue-form").addEventListener("input", showCurl);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    announce("The curl command is copied.");
  } catch {
    getSelection().selectAllChildren($("curl"));
    announce("The curl command is selected. Copy it with the keyboard.");
  }
});

$("enqueue-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  let body;
  try {
    body = payload();
  } catch (error) {
    complain(error);
    if (isJson()) $("json").focus();
    else form.focus();
    return;
  }
  const button = event.submitter ?? $("enqueue-form").querySelector("button.primary");
  button.disabled = true;
  try {
    const job = await (await send("POST", enqueuePath(), { body })).json();
    announce(`Enqueued: ${job.function} ${short(job.job_id)} is ${job.job_status}.`);
    location.hash = `#job=${encodeURIComponent(job.job_id)}`;
  } catch (error) {
    const rest = [];
    for (const each of error.errors ?? []) {
      const isField = each.loc[0] === "body" && !isJson() && form.complain(each.loc.slice(1).map(String), each.msg);
      if (!isField) rest.push(each);
    }
    if (error instanceof Problem) error.errors = rest;
    complain(error);
    if (!isJson()) form.focus();
  } finally {
    button.disabled = false;
  }
});

/** Offer these functions in the form. */
export function offerFunctions(found) {
  functions = found;
  $("function").replaceChildren(...functions.map((each) => el("option", {}, each.name)));
  if (functions.some((each) => each.name === "some_long_function")) $("function").value = "some_long_function";
  showFunction();
}
