// The parts that all views share: messages, the state of the connection, the form for the key, the buttons of a job.

import { Mistake, Problem, hasKey, send, useKey } from "./api.js";
import { TERMINAL, el, setText } from "./elements.js";

export const $ = (id) => document.getElementById(id);
export const short = (jobId) => jobId.slice(0, 8);

/** Show a message of success. It replaces an error message. */
export function announce(text) {
  $("alert").replaceChildren();
  setText($("news"), text);
}

export function complain(error) {
  if (error instanceof Problem && error.status === 401) {
    askForKey(hasKey() ? "The service does not know this key." : "");
    return;
  }
  if (!(error instanceof Problem || error instanceof Mistake)) console.error(error);
  setText($("news"), "");
  const items = (error.errors ?? []).map((each) => el("li", {}, `${each.loc.join(".")}: ${each.msg}`));
  $("alert").replaceChildren(
    el("div", { class: "notice bad" }, error.message, items.length ? el("ul", {}, ...items) : null));
}

export function connectionIs(text, isGood) {
  setText($("connection"), text);
  $("connection").className = isGood ? "good" : "bad";
}

export function lost(error) {
  connectionIs(error.status ? error.message : "service not reachable, trying again", false);
}

/** Show only the form for the key. The form hides itself once it has a key. */
export function askForKey(why) {
  useKey(null);
  $("overview").hidden = $("job").hidden = true;
  $("alert").replaceChildren(...(why ? [el("div", { class: "notice bad" }, why)] : []));
  connectionIs("needs a key", false);
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

/** Cancel or retry a job. Returns its new status, or null after an error. */
async function act(job, path) {
  try {
    const status = await (await send("POST", `${path}?job_id=${encodeURIComponent(job.job_id)}`)).json();
    const what = status.job_status === "started" ? "being stopped" : status.job_status;
    announce(`${job.function ?? "job"} ${short(job.job_id)} is ${what}.`);
    return status;
  } catch (error) {
    complain(error);
    return null;
  }
}

/** Make the buttons of a job. `setActions` shows the buttons that its status allows. */
export function actions(current, changed = () => {}) {
  const press = (path) => async (event) => {
    event.target.disabled = true;
    const status = await act(current(), path);
    event.target.disabled = false;
    if (status) changed(status);
  };
  return el("span", { class: "actions" },
    el("button", { type: "button", click: press("/cancel") }, "Cancel"),
    el("button", { type: "button", click: press("/retry") }, "Retry"));
}

export function setActions(element, job) {
  const [cancel, retry] = element.children;
  cancel.hidden = TERMINAL.includes(job.job_status);
  retry.hidden = !["failed", "stopped", "canceled"].includes(job.job_status);
  for (const button of [cancel, retry]) {
    button.setAttribute("aria-label", `${button.textContent} ${job.function ?? "job"} ${short(job.job_id)}`);
  }
}
