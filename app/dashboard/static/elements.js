// Small pieces of the page. Data from the API is always added as text, never as markup.

/** Make an element. Null and false attributes are left out; functions become event listeners. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Set a text only if it differs: a screen reader reads a new text aloud, and a selection in the old one is lost. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const SYMBOLS = {
  queued: "○", started: "▶", deferred: "…", scheduled: "◷", finished: "✓", failed: "✕", stopped: "■", canceled: "⊘",
};
export const STATUSES = Object.keys(SYMBOLS);
export const TERMINAL = ["finished", "failed", "stopped", "canceled"];

export function setBadge(badge, status) {
  if (badge.dataset.status === status) return;
  badge.dataset.status = status;
  badge.className = "badge";
  badge.replaceChildren(el("span", { "aria-hidden": "true" }, `${SYMBOLS[status] ?? "·"} `), status);
}

export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 99.5) return `${value.toPrecision(2).replace(/\.0$/, "")} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 129600 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
}

export function between(start, end) {
  return Math.max(0, (Date.parse(end) - Date.parse(start)) / 1000);
}

export function bytes(value) {
  if (value < 1000) return `${value} bytes`;
  return value < 1e6 ? `${(value / 1e3).toPrecision(3)} kB` : `${(value / 1e6).toPrecision(3)} MB`;
}

/** Say in words what a job does or did, and since when. */
export function describe(job, now) {
  if (job.started_at && job.ended_at) {
    return `ran ${seconds(between(job.started_at, job.ended_at))}, ${seconds(between(job.ended_at, now))} ago`;
  }
  if (job.job_status === "started") return `running for ${seconds(between(job.started_at, now))}`;
  const since = job.ended_at ?? job.enqueued_at;
  return since ? `${job.job_status} ${seconds(between(since, now))} ago` : job.job_status;
}

/** Make a progress bar with its text, for `setProgress`. */
export function progressBar(label) {
  return el("div", { class: "progress" }, el("progress", { "aria-label": label, max: "1" }), el("span"));
}

export function setProgress(element, job) {
  const progress = job.job_status === "started" ? job.progress : null;
  element.hidden = progress === null;
  if (progress === null) return;
  const [bar, text] = element.children;
  bar.max = progress.total > 0 ? progress.total : 1;
  bar.value = Math.min(progress.done, bar.max);
  setText(text, `${progress.done} of ${progress.total}${progress.message ? `: ${progress.message}` : ""}`);
}

/** Make a chart of numbers over time, with the last number as text. `show` adds a number. */
export function chart(label, unit = "") {
  const KEPT = 60;
  const svgName = "http://www.w3.org/2000/svg";
  const values = [];
  const svg = document.createElementNS(svgName, "svg");
  const line = document.createElementNS(svgName, "polyline");
  svg.setAttribute("viewBox", `0 0 ${KEPT - 1} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true"); // the number beside it says the same in text
  svg.append(line);
  const number = el("strong");
  const most = el("span", { class: "hint" });
  const element = el("div", { class: "chart" }, el("span", {}, label), number, svg, most);
  return {
    element,
    show(value) {
      values.push(value);
      if (values.length > KEPT) values.shift();
      const top = Math.max(...values, 1);
      const from = KEPT - values.length;
      line.setAttribute("points", values.map((each, at) => `${from + at},${19 - (18 * each) / top}`).join(" "));
      setText(number, `${value}${unit}`);
      setText(most, `highest: ${Math.max(...values)}`);
    },
  };
}

/** Make a tree of JSON data. Deeper levels are folded, and their elements are made when they are opened. */
export function jsonTree(value, open = 2, name = null) {
  const named = name === null ? null : el("span", { class: "name" }, `${name}: `);
  if (value === null || typeof value !== "object") {
    const kind = value === null ? "null" : typeof value;
    return el("span", { class: "json" }, named, el("span", { class: kind }, kind === "bigint" ? `${value}` : JSON.stringify(value)));
  }
  const MOST = 200; // entries at a time
  const isArray = Array.isArray(value);
  const entries = Object.entries(value);
  const what = isArray ? `[ ${entries.length} ]` : `{ ${entries.length} }`;
  if (!entries.length) return el("span", { class: "json" }, named, isArray ? "[]" : "{}");
  const list = el("ul");
  const details = el("details", { class: "json" }, el("summary", {}, named, what), list);
  let shown = 0;
  const more = () => {
    for (const [key, each] of entries.slice(shown, shown + MOST)) {
      list.append(el("li", {}, jsonTree(each, open - 1, isArray ? null : key)));
    }
    shown += MOST;
    if (shown < entries.length) {
      const next = el("li", {}, el("button", { type: "button", click: () => { next.remove(); more(); } },
        `Show ${entries.length - shown} more`));
      list.append(next);
    }
  };
  details.addEventListener("toggle", () => { if (details.open && !shown) more(); });
  if (open > 0) {
    details.open = true;
    more();
  }
  return details;
}
