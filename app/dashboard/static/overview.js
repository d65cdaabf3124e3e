// The overview: queues, workers and a page of jobs, read once a second.

import { Problem, pause, read, send } from "./api.js";
import { STATUSES, chart, describe, el, progressBar, seconds, setBadge, setProgress, setText } from "./elements.js";
import { $, actions, askForKey, connectionIs, lost, setActions, short } from "./page.js";

const EVERY = 1; // seconds between two reads
const SHOWN = 20; // jobs of a page

// An entry is made once. Later only its changes are written, so that focus and selection stay

function updateList(list, entries, known, make) {
  const wanted = new Set(entries.map(([id]) => id));
  for (const [id, row] of known) {
    if (!wanted.has(id)) {
      row.element.remove();
      known.delete(id);
    }
  }
  entries.forEach(([id, data], at) => {
    if (!known.has(id)) known.set(id, make(id));
    const row = known.get(id);
    row.update(data);
    if (list.children[at] !== row.element) list.insertBefore(row.element, list.children[at] ?? null);
  });
}

function jobRow(id) {
  let job = null;
  const badge = el("span"), queue = el("span", { class: "hint" }), when = el("span", { class: "hint" });
  const name = el("span", { class: "function" });
  const link = el("a", { href: `#job=${encodeURIComponent(id)}` }, name, " ", el("code", {}, short(id)));
  const bar = progressBar(`Progress of ${short(id)}`), error = el("span", { class: "error" });
  const buttons = actions(() => job, wake);
  return {
    element: el("li", { class: "job" }, badge, link, queue, when, el("span", { class: "grow" }, bar, error), buttons),
    update([found, now]) {
      job = found;
      setBadge(badge, job.job_status);
      setText(name, job.function ?? "?");
      setText(queue, job.queue ?? "");
      setText(when, describe(job, now));
      setProgress(bar, job);
      setText(error, job.error ? `${job.error.type}: ${job.error.message}` : "");
      setActions(buttons, job);
    },
  };
}

function queueCard(name) {
  const charts = { waiting: chart("waiting"), running: chart("running"), failed: chart("failed"), rate: chart("per minute") };
  const about = el("p", { class: "hint" });
  return {
    element: el("li", { class: "panel" }, el("h3", {}, name), about, ...Object.values(charts).map((each) => each.element)),
    update(queue) {
      const { jobs } = queue;
      charts.waiting.show((jobs.queued ?? 0) + (jobs.scheduled ?? 0) + (jobs.deferred ?? 0));
      charts.running.show(jobs.started ?? 0);
      charts.failed.show(jobs.failed ?? 0);
      charts.rate.show(Math.round(queue.runs_per_minute * 10) / 10);
      const parts = [`${queue.workers} ${queue.workers === 1 ? "worker" : "workers"}`];
      if (queue.oldest_waiting_seconds !== null) parts.push(`oldest job waits ${seconds(queue.oldest_waiting_seconds)}`);
      if (queue.mean_run_seconds !== null) parts.push(`mean run ${seconds(queue.mean_run_seconds)}`);
      setText(about, parts.join(", "));
      about.classList.toggle("bad", queue.workers === 0);
    },
  };
}

function workerRow(name) {
  const badge = el("span"), queues = el("span", { class: "hint" }), runs = el("span");
  let shown = null;
  return {
    element: el("li", {}, badge, el("code", {}, short(name)), queues, runs),
    update(worker) {
      setBadge(badge, worker.state);
      setText(queues, worker.queues.join(", "));
      if (shown === worker.job_ids.join()) return;
      shown = worker.job_ids.join();
      runs.replaceChildren(...worker.job_ids.map((id) =>
        el("a", { href: `#job=${encodeURIComponent(id)}` }, "runs ", el("code", {}, short(id)))));
    },
  };
}

const known = { queues: new Map(), workers: new Map(), jobs: new Map() };
let isAdmin = true;
let cursor = ""; // the page of jobs that is shown; "" is the newest page
let next = null;

async function showQueues() {
  if (!isAdmin) return;
  try {
    const { queues, workers } = await read("/queues");
    updateList($("queues"), queues.map((each) => [each.name, each]), known.queues, queueCard);
    updateList($("workers"), workers.map((each) => [each.name, each]), known.workers, workerRow);
    if ($("queue-names").children.length !== queues.length) {
      $("queue-names").replaceChildren(...queues.map((each) => el("option", { value: each.name })));
    }
    $("workers-title").hidden = false;
    setText($("workers-title"), workers.length ? "Workers" : "No live workers: jobs wait until one starts");
  } catch (error) {
    if (error.status !== 403) throw error;
    isAdmin = false;
  }
  $("no-admin").hidden = isAdmin;
  if (!isAdmin) $("workers-title").hidden = true;
}

function jobsPath() {
  const query = new URLSearchParams({ limit: SHOWN });
  for (const [name, value] of new FormData($("filters"))) if (value) query.set(name, value);
  if (cursor) query.set("cursor", cursor);
  return `/jobs?${query}`;
}

async function showJobs() {
  const path = jobsPath();
  const response = await send("GET", path);
  const page = await response.json();
  if (path !== jobsPath()) return; // the person chose another filter meanwhile
  const now = response.headers.get("Date") ?? new Date().toISOString();
  updateList($("jobs"), page.jobs.map((each) => [each.job_id, [each, now]]), known.jobs, jobRow);
  next = page.next === null ? null : new URL(page.next, location).searchParams.get("cursor");
  $("older").hidden = next === null;
  $("newest").hidden = cursor === "";
  $("no-jobs").hidden = page.jobs.length > 0;
  const isFiltered = [...new FormData($("filters")).values()].some(Boolean);
  setText($("no-jobs"), isFiltered ? "No jobs match." : "No jobs yet. Enqueue one with the form above.");
}

$("older").addEventListener("click", () => { cursor = next ?? ""; wake(); });
$("newest").addEventListener("click", () => { cursor = ""; wake(); });
$("filters").addEventListener("input", () => { cursor = ""; wake(); });
$("filters").addEventListener("submit", (event) => event.preventDefault());

// One loop reads everything. `wake` makes it read now

let woken = new AbortController();

export function wake() {
  woken.abort();
}

async function readAll() {
  let wait = EVERY;
  try {
    await Promise.all([showQueues(), showJobs()]);
    connectionIs("live", true);
  } catch (error) {
    wait = Math.max(2, error.retryAfter ?? 0);
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) askForKey("");
    else lost(error);
  }
  return wait;
}

/** Read again and again while the overview is shown. */
export async function run() {
  for (;;) {
    let wait = EVERY;
    woken = new AbortController();
    if (!$("overview").hidden && !document.hidden) wait = await readAll();
    await pause(wait, woken.signal);
  }
}

document.addEventListener("visibilitychange", wake);

/** Start again with another key, which may see other jobs and have other rights. */
export function resetOverview(functions) {
  isAdmin = true;
  cursor = "";
  $("filters").elements.function.replaceChildren(el("option", { value: "" }, "any"),
    ...functions.map((each) => el("option", {}, each.name)));
}

$("filters").elements.status.append(...STATUSES.map((each) => el("option", {}, each)));
