// The page of one job: its status, live, its payload, and its result or error.

import { follow, read, send } from "./api.js";
import {
  TERMINAL, between, bytes, el, jsonTree, progressBar, seconds, setBadge, setProgress, setText,
} from "./elements.js";
import { $, actions, complain, connectionIs, lost, setActions } from "./page.js";

const title = document.title;

function moment(label, value, more) {
  return el("li", { class: value ? "" : "hint" }, el("span", { class: "name" }, label), " ",
    value ? el("time", { datetime: value }, new Date(value).toLocaleString()) : "not yet", more ? ` (${more})` : null);
}

/** Parse JSON, and keep long integers exact: a double has only 53 bits. */
function parseExactly(text) {
  return JSON.parse(text, (_, value, context) => {
    const isLong = typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "");
    return isLong ? BigInt(context.source) : value;
  });
}

/** Show this job until `signal` is aborted, when the person leaves the page. */
export function showJob(jobId, signal) {
  let job = null, isWatched = false;
  const heading = el("h2", { id: "job-title", tabindex: "-1" }, "Job ", el("code", {}, jobId));
  const badge = el("span"), bar = progressBar("Progress"), timeline = el("ol", { class: "timeline" });
  const facts = el("dl"), error = el("div"), result = el("div");
  const size = el("span", { class: "hint" });
  const given = el("details", {}, el("summary", {}, "Payload ", size));
  const buttons = actions(() => job, (status) => { update(status); watch(); });

  given.addEventListener("toggle", async () => {
    if (!given.open || given.children.length > 1) return;
    given.append(await value(`/get_payload?job_id=${encodeURIComponent(jobId)}`));
  });

  async function value(path) {
    try {
      const text = await (await send("GET", path)).text();
      return jsonTree(parseExactly(text), text.length < 3000 ? Infinity : 2);
    } catch (wrong) {
      return el("p", { class: "error" }, wrong.message);
    }
  }

  async function update(found) {
    if (signal.aborted) return;
    job = found;
    setBadge(badge, job.job_status);
    document.title = `${job.job_status} · ${job.function ?? "job"} · ${title}`;
    setProgress(bar, job);
    setActions(buttons, job);
    const waited = job.started_at && job.enqueued_at ? `waited ${seconds(between(job.enqueued_at, job.started_at))}` : "";
    const ran = job.started_at && job.ended_at ? `ran ${seconds(between(job.started_at, job.ended_at))}` : "";
    timeline.replaceChildren(moment("enqueued", job.enqueued_at), moment("started", job.started_at, waited),
      moment("ended", job.ended_at, ran));
    const pairs = [["Function", job.function], ["Queue", job.queue], ["Retries left", job.retries_left]];
    facts.replaceChildren(
      ...pairs.filter(([, each]) => each !== null).flatMap(([name, each]) => [el("dt", {}, name), el("dd", {}, String(each))]));
    error.replaceChildren(...(job.error
      ? [el("div", { class: "notice bad" }, el("strong", {}, job.error.type), el("pre", {}, job.error.message))] : []));
    if (job.job_status !== "finished") {
      result.replaceChildren();
    } else if (!result.children.length) {
      result.append(el("h3", {}, "Result"));
      result.append(await value(`/get_result?job_id=${encodeURIComponent(jobId)}`));
    }
  }

  async function watch() {
    if (isWatched || TERMINAL.includes(job.job_status)) return;
    isWatched = true;
    try {
      await follow(jobId, (found) => { connectionIs("live", true); update(found); }, lost, signal);
    } catch (wrong) {
      complain(wrong);
    }
    isWatched = false;
  }

  async function measure() {
    try {
      const response = await send("HEAD", `/get_payload?job_id=${encodeURIComponent(jobId)}`);
      setText(size, bytes(Number(response.headers.get("Content-Length"))));
    } catch {
      setText(size, "size unknown");
    }
  }

  $("job").replaceChildren(
    el("p", {}, el("a", { href: "#" }, "← All jobs")), heading,
    el("p", { class: "in-line" }, badge, buttons), bar, error, timeline, facts, given, result);
  heading.focus();
  read(`/check_status?job_id=${encodeURIComponent(jobId)}`).then(update).then(watch, complain);
  measure();
}
