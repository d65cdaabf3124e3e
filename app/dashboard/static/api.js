// A client of the public API. Only this module keeps the key, and only in memory: it is gone with the tab.

let key = null;

export function useKey(value) {
  key = value;
}

export function hasKey() {
  return key !== null;
}

/** An error response of the service (RFC 9457). Status 0 means that the service did not answer. */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.detail ? `${body.title}: ${body.detail}` : body.title);
    this.status = status;
    this.name = (body.type ?? "").replace("/problems/", "");
    this.errors = body.errors ?? [];
    this.retryAfter = Number(retryAfter) || 0; // seconds
  }
}

/** An input of the person that is not valid. */
export class Mistake extends Error {}

/** The URL of a route. It is relative to this page, since a proxy may put the whole service below a path. */
export function urlOf(path) {
  return new URL(path.slice(1), document.baseURI);
}

/** Send a request and return the response. Throws a Problem if it is an error. */
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
 * Call `changed` with the status of a job at each change, until the job has ended. Call `lost` with the error each time
 * that the connection is lost. This is not an EventSource, since that cannot send a key. Throws a Problem if the
 * service refuses the request.
 */
export async function follow(jobId, changed, lost, signal) {
  let last = null;
  while (!signal.aborted) {
    let wait = 2;
    try {
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const response = await send("GET", `/events?job_id=${encodeURIComponent(jobId)}`, { headers, signal });
      if (response.status === 204) return;
      for await (const event of eventsOf(response.body)) {
        last = event.id ?? last;
        if (event.data) changed(JSON.parse(event.data));
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
