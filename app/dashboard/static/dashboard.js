// The start of the page: it asks for a key if the service needs one, and shows the overview or a job.

import { hasKey, pause, read, useKey } from "./api.js";
import { setText } from "./elements.js";
import { offerFunctions } from "./enqueue_form.js";
import { showJob } from "./job_page.js";
import { resetOverview, run, wake } from "./overview.js";
import { $, askForKey, connectionIs, lost } from "./page.js";

const title = document.title;

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!/^[ -~]+$/.test($("key").value)) {
    askForKey("This is not a key: a key has ASCII characters only.");
    return;
  }
  useKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  await begin();
});

let left = new AbortController(); // aborted when the person leaves a job's page

/** Show the job or the overview that the address names. */
function route() {
  left.abort();
  left = new AbortController();
  const jobId = new URLSearchParams(location.hash.slice(1)).get("job");
  $("overview").hidden = jobId !== null;
  $("job").hidden = jobId === null;
  $("alert").replaceChildren();
  if (jobId !== null) {
    showJob(jobId, left.signal);
    connectionIs("live", true);
    return;
  }
  document.title = title;
  $("job").replaceChildren();
  wake();
}

addEventListener("hashchange", () => {
  if (!$("key-form").hidden) return;
  if (location.hash === "#main") return; // the link "Skip to the content"
  const wasJob = !$("job").hidden;
  route();
  if (wasJob && $("job").hidden) {
    setText($("news"), "");
    $("main").focus();
  }
});

async function begin() {
  let functions;
  for (;;) {
    try {
      ({ functions } = await read("/functions"));
      break;
    } catch (error) {
      if (error.status === 401) {
        askForKey(hasKey() ? "The service does not know this key." : "");
        return;
      }
      lost(error);
      await pause(Math.max(2, error.retryAfter ?? 0));
    }
  }
  offerFunctions(functions);
  resetOverview(functions);
  route();
}

run();
begin();
