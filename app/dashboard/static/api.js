// The public API, as any client uses it. The key is kept here and nowhere else: it is gone with the tab.

let key = null;

export function useKey(value) {
  key = value;
}

export function hasKey() {
  return key !== null;
}

/** What the service refused (RFC 9457), or that it did not answer (status 0). */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.detail ? `${body.title}: ${body.detail}` : body.title);
    this.status = status;
    this.name = (body.type ?? "").replace("/problems/", "");
    this.errors = body.errors ?? [];
    this.retryAfter = Number(retryAfter) || 0; // seconds
  }
}

/** What a person wrote is not what is wanted. */
export class Mistake extends Error {}

/** Where a route is: beside this page, also where a proxy has put the whole service below a path. */
export function urlOf(path) {
  return new URL(path.slice(1), document.baseURI);
}

/** A response that is no problem; throws a Problem. */
export async function send(method, path, { body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (key !== null) all.Authorization = `Bearer ${key}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), { method, body, headers: all, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, { title: "The service does not answer" });
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ title: `The service answered ${response.status}` }));
  throw new Problem(response.status, problem, response.headers.get("Retry-After"));
}

export async function read(path) {
  return (await send("GET", path)).json();
}

export function pause(seconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted) {
      resolve();
      return;
    }
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); });
  });
}

/**
 * Tell of each change of a job, until it has ended, and of each time that the service is lost meanwhile. It is not an
 * EventSource, which can send no key. Throws a Problem once there is nothing to follow.
 */
export async function follow(jobId, told, lost, signal) {
  let last = null;
  while (!signal.aborted) {
    let wait = 2;
    try {
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const response = await send("GET", `/events?job_id=${encodeURIComponent(jobId)}`, { headers, signal });
      if (response.status === 204) return;
      for await (const event of eventsOf(response.body)) {
        last = event.id ?? last;
        if (event.data) told(JSON.parse(event.data));
        if (event.event === "end") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
      wait = Math.max(wait, error.retryAfter ?? 0);
      lost(error);
    }
    await pause(wait, signal);
  }
}

async function* eventsOf(stream) {
  let text = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").filter((line) => !line.startsWith(":"));
      if (fields.length) yield Object.fromEntries(fields.map((line) => line.split(/: (.*)/s, 2)));
    }
  }
}
