-- The part that all scripts share: keys, times, counts and the steps of a job's life. app/core/scripts.py puts this
-- text in front of each script and replaces the words in braces, such as {RQ}. The scripts build all keys from ids, so
-- they need one Redis and not a cluster, as RQ itself does.
--
-- KEYS: all that the scripts and the service use. Each name begins with RQ's prefix (`rq:` by default), left out here.
-- "scripts" are the files of this folder; a .py file is one of `app/`. "RQ" is RQ's own code: in our worker, in a stock
-- worker, in the command `rq`.
--   TTL (1): while the job waits, its `ttl`, if it has one; none while it runs; then its `result_ttl` or `failure_ttl`.
--   TTL (2): the lease and GRACE, or a minute more.
--
-- key                                          type    TTL          who writes it: what it holds
-- job:<job>                                    hash    (1)          scripts, RQ, worker/outcomes.py: the job's fields
-- job:<job>:dependents                         set     (1)          RQ: ids of the jobs that wait for this one
-- job::<job>:dependencies                      set     (1)          RQ: ids of the jobs that this one waits for
-- results:<job>                                stream  (1)          finish, release, cancel, RQ: its last ten results
-- queues                                       set     none         scripts, RQ: the keys of all queues
-- queue:<queue>                                list    none         scripts, RQ: ids of waiting jobs, the next first
-- queue:<queue>:intermediate                   list    none         RQ: ids that a stock worker popped; see recover
-- queue:<queue>:intermediate:first_seen:<job>  string  1 day        recover, RQ: when such an id was seen first
-- wip:<queue>                                  zset    none         scripts, RQ: <job>:<execution> by lease end + GRACE
-- scheduled:<queue>                            zset    none         scripts, RQ: ids of jobs by the time they are due
-- deferred:<queue>                             zset    none         RQ: ids of jobs that wait for other jobs
-- ready:<queue>                                zset    none         RQ: ids of such jobs on their way to a queue
-- finished:<queue>                             zset    none         finish, RQ: ids of jobs by the end of their TTL
-- failed:<queue>                               zset    none         scripts, RQ: likewise, failed and stopped ones
-- canceled:<queue>                             zset    none         cancel, RQ, worker/rq_worker.py: likewise
-- executions:<job>                             zset    (2)          scripts, RQ: ids of the job's executions
-- execution:<job>:<execution>                  hash    (2)          scripts, RQ: one run, with `lease_until`
-- worker:<worker>                              hash    35 s         take, RQ, worker/rq_worker.py: a live worker
-- worker:<worker>:executions                   set     (2)          scripts, RQ: the <job>:<execution>s that it holds
-- workers                                      set     none         RQ, worker/rq_worker.py: the keys of all workers
-- workers:<queue>                              set     none         RQ, worker/rq_worker.py: those of a queue
-- suspended                                    string  as asked     RQ: `rq suspend` was run; take gives no job
-- clean_registries:<queue>                     string  899 s        RQ: the lock of a worker that cleans registries
-- clean_groups                                 string  600 s        RQ: a lock, so that groups are cleaned now and then
-- groups                                       set     none         enqueue, RQ: ids of all groups
-- group:<group>                                set     `group_ttl`  enqueue, RQ: ids of the group's jobs
-- api:group:<group>                            string  `group_ttl`  enqueue: how many jobs the group had at first
-- api:key:<key id>                             string  `key_ttl`    enqueue: fingerprint of an idempotent request
-- api:events                                   stream  none         scripts: the event log, its last 10000 or so
-- api:doorbell                                 stream  none         scripts: one entry, which wakes idle workers
-- api:metrics                                  hash    none         scripts: counts for /metrics (`count`, `observe`)
-- api:minute:<queue>:<minute>                  hash    180 s        finish: runs that ended in that minute
-- api:jobs:<owner or nothing>:<status>         zset    none         scripts: ids of jobs by creation, for /jobs
-- api:owners                                   set     none         scripts: owners who have such an index
-- api:sweep                                    hash    none         sweep: where it stopped in each index
-- api:swept                                    string  1 s          sweep: a lock, so that it runs once a second
-- api:secret                                   string  none         core/job_ids.py: the secret that signs job ids
-- api:probe                                    string  60 s         web/routes/ops.py: proof that Redis takes writes
-- api:webhooks:<job>                           list    11 days      scripts, webhooks/delivery.py: ids of its messages
-- api:tries:<message>                          list    11 days      webhooks/delivery.py: a message's tries, as JSON
--
-- The last two live for RESULT_TTL once the message is delivered; a worker's hash lives for 60 s once it has ended.
-- pubsub:<worker> is no key but a channel: `cancel` and RQ send commands to a worker on it. Flask-Limiter counts
-- requests for RATE_LIMIT in strings below LIMITS:, without RQ's prefix. Only RQ's own code uses its keys for rate
-- limits (rl-keys, rl:*), its scheduler (scheduler*) and `rq cron` (cron_*).

local RQ = '{RQ}'
local EVENTS = RQ .. ':api:events'
local DOORBELL = RQ .. ':api:doorbell'
local EVENTS_KEPT = 10000

-- RQ's cleanup fails a job once its score in the started registry has passed. Our score is this many seconds later than
-- the end of the lease, so that `recover` comes first, even if `rq info` runs RQ's cleanup while no worker is up all
-- night. The keys of the run live as long.
local GRACE = 86400

local function job_key(id) return RQ .. ':job:' .. id end
local function queue_key(queue) return RQ .. ':queue:' .. queue end
local function registry_key(name, queue) return RQ .. ':' .. name .. ':' .. queue end
local function results_key(id) return RQ .. ':results:' .. id end
local function executions_key(id) return RQ .. ':executions:' .. id end
local function execution_key(id, execution) return RQ .. ':execution:' .. id .. ':' .. execution end
local function worker_key(worker) return RQ .. ':worker:' .. worker end
local function worker_executions_key(worker) return worker_key(worker) .. ':executions' end
local function group_key(group) return RQ .. ':group:' .. group end
local function group_size_key(group) return RQ .. ':api:group:' .. group end

-- Read fields of a job's hash. Other programs may write to Redis, too. So a key of another type counts as a hash
-- without fields, and a text that is no number counts as the default: a script must not raise half-way, because Redis
-- keeps what it wrote before.
local function read(id, ...)
  local values = redis.pcall('HMGET', job_key(id), ...)
  return values.err and {} or values
end

local function number(value, default)
  local found = tonumber(value or '')
  if found and found == found and math.abs(found) < 1e11 then return found end
  return default
end

local function integer(value, default) return math.floor(number(value, default)) end

-- The time by Redis' clock, in seconds since 1970. Scripts use no other clock.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- Format a time as RQ does: 2026-11-23T10:00:00.123456Z. The sandbox has no os.date. The calendar arithmetic is
-- civil_from_days of H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
local function timestamp(seconds)
  local whole = math.floor(seconds)
  local days = math.floor(whole / 86400)
  local rest = whole - days * 86400
  days = days + 719468
  local era = math.floor(days / 146097)
  local doe = days - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, doy - math.floor((153 * mp + 2) / 5) + 1,
    math.floor(rest / 3600), math.floor(rest / 60) % 60, rest % 60, math.floor((seconds - whole) * 1e6))
end

-- Parse a time in that format; nil if the text is none.
local function seconds_since_1970(stamp)
  local year, month, day, hour, minute, second =
    string.match(stamp or '', '^(%d%d%d%d)-(%d%d)-(%d%d)T(%d%d):(%d%d):(%d%d%.?%d*)Z$')
  if not year then return nil end
  year, month = tonumber(year), tonumber(month)
  if month <= 2 then year = year - 1 end
  local doy = math.floor((153 * (month > 2 and month - 3 or month + 9) + 2) / 5) + day - 1
  local days = 365 * year + math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400) + doy - 719468
  return days * 86400 + hour * 3600 + minute * 60 + second
end

-- Format seconds with all their microseconds. Lua's own tostring keeps 14 digits only.
local function exact(seconds) return string.format('%.6f', seconds) end

-- Add an entry to the event log. Web processes read it, to wake the clients that wait for this job.
local function log_event(id, status)
  redis.call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'job_id', id, 'status', status)
end

-- Count an event for `/metrics`, in a hash with a number for each `event:queue:function`. It uses `pcall`, so that no
-- value that another program wrote there stops a transition.
local METRICS = RQ .. ':api:metrics'
local function count(event, queue, fn, by)
  redis.pcall('HINCRBY', METRICS, event .. ':' .. queue .. ':' .. (fn or ''), by or 1)
end

-- Note how long a job waited or ran, in the same hash. `wait:<number>:<function>` counts the jobs that took at most the
-- bound of this number and more than the bound before. Number 0 is the sum of all times, in microseconds.
local function observe(what, fn, seconds)
  local bounds, number = {{BOUNDS}}, 1
  while bounds[number] and seconds > bounds[number] do number = number + 1 end
  redis.pcall('HINCRBY', METRICS, what .. ':' .. number .. ':' .. (fn or ''), 1)
  redis.pcall('HINCRBY', METRICS, what .. ':0:' .. (fn or ''), math.floor(seconds * 1e6))
end

-- For `/queues`: how many runs of a queue's jobs ended in this minute, and how many microseconds they took.
local function minute_key(queue, now) return RQ .. ':api:minute:' .. queue .. ':' .. math.floor(now / 60) end

-- The index for `/jobs`: a sorted set of job ids, by the microsecond of their creation, for each scope and each status.
-- A scope is one owner's jobs, or '' for all jobs. A job is in one set of a scope at a time. So a page of one status
-- reads one set, and a page of all statuses merges a few sets. An entry takes 111 bytes (benchmarks/RESULTS.md); a job
-- with an owner has two.
local STATUSES = {'queued', 'started', 'deferred', 'scheduled', 'finished', 'failed', 'stopped', 'canceled'}
local OWNERS = RQ .. ':api:owners'
local WEBHOOK_OWNER = 'webhooks:' -- owns the messages to webhooks, which no list shows; no API key can have this name
local function index_key(scope, status) return RQ .. ':api:jobs:' .. scope .. ':' .. status end

-- The scopes that a job belongs to. A caller that has read the job's owner passes it; without it, this reads the hash.
local function index_scopes(id, owner)
  if owner == nil then owner = read(id, 'owner')[1] end
  if not owner or owner == '' then return {''} end
  if owner == WEBHOOK_OWNER then return {} end
  return {'', owner}
end

local function microseconds(seconds) return string.format('%.0f', seconds * 1e6) end

-- Remove a job from a scope of the index. Returns the microsecond of its creation; nil if it was not there.
local function remove_from_index(scope, id, status)
  local created = redis.call('ZSCORE', index_key(scope, status), id)
  if not created then
    -- RQ's own code, which knows no index, may have changed the status: the job is in the set of an earlier one.
    for _, each in ipairs(STATUSES) do
      status, created = each, redis.call('ZSCORE', index_key(scope, each), id)
      if created then break end
    end
  end
  if created then redis.call('ZREM', index_key(scope, status), id) end
  return created
end

-- Move a job in the index from one status to another, and log the event. The caller has written the status to the hash.
local function change_status(id, was, status, owner)
  for _, scope in ipairs(index_scopes(id, owner)) do
    local created = remove_from_index(scope, id, was)
    if not created and scope ~= '' then redis.call('SADD', OWNERS, scope) end
    redis.call('ZADD', index_key(scope, status), created or microseconds(clock()), id)
  end
  log_event(id, status)
end

-- Webhooks: if a job has the field `notify`, a URL, the service sends a message there when the job has ended. The
-- message is a job, too, on this queue.
local WEBHOOKS = '{WEBHOOKS}'
-- Seconds between the tries of a message, as Standard Webhooks recommends ("Deliverability and reliability").
local RETRY_PAUSES = {5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400}
local RETRIES = #RETRY_PAUSES
-- Seconds that the list of a job's messages is kept while none is delivered: all the tries, and the week that a failure
-- is kept.
local MESSAGES_KEPT = {MESSAGES_KEPT}
local function deliveries_key(id) return RQ .. ':api:webhooks:' .. id end
local function tries_key(id) return RQ .. ':api:tries:' .. id end

-- Wake the idle workers: they block on this stream.
local function wake_workers()
  redis.call('XADD', DOORBELL, 'MAXLEN', 1, '*', 'rung', 1)
end

local function push(id, queue, at_front)
  redis.call('SADD', RQ .. ':queues', queue_key(queue))
  redis.call(at_front and 'LPUSH' or 'RPUSH', queue_key(queue), id)
end

-- Put a job back into its queue, from another status or place.
local function make_waiting(id, was, queue, at_front, now)
  redis.call('HSET', job_key(id), 'status', 'queued', 'enqueued_at', timestamp(now), 'started_at', '', 'ended_at', '',
    'worker_name', '')
  redis.call('HDEL', job_key(id), 'progress', 'error')
  push(id, queue, at_front)
  wake_workers()
  change_status(id, was, 'queued')
end

-- The number of a queue's waiting and scheduled jobs, which MAX_QUEUE_LENGTH limits.
local function queue_length(queue)
  return redis.call('LLEN', queue_key(queue)) + redis.call('ZCARD', registry_key('scheduled', queue))
end

-- Whether this execution still holds the lease of the job. This is the fence in front of everything that a worker
-- writes: the execution must be in the started registry, and `status`, the job's status, must be `started`. `release`
-- after a lost lease, `cancel` and RQ's own cleanup remove the entry. Any other status means that another actor has
-- ended the run.
local function owns_lease(id, execution, queue, status)
  return status == 'started' and redis.call('ZSCORE', registry_key('wip', queue), id .. ':' .. execution)
end

local function extend_lease(id, execution, queue, worker, lease, now)
  local ttl = math.ceil(lease) + GRACE
  -- First a command that needs no memory: once a script has written, Redis refuses none of its later writes for want of
  -- memory. So a full Redis lets no lease run out.
  redis.call('EXPIRE', worker_executions_key(worker), ttl + 60)
  -- Write all fields: the key may have expired. RQ cannot read a run with some fields missing, and `cancel` would take
  -- it for the run of a dead worker.
  redis.call('HSET', execution_key(id, execution), 'id', execution, 'job_id', id, 'worker_name', worker,
    'last_heartbeat', exact(now), 'lease_until', exact(now + lease))
  redis.call('HSETNX', execution_key(id, execution), 'created_at', exact(now))
  redis.call('EXPIRE', execution_key(id, execution), ttl)
  redis.call('ZADD', registry_key('wip', queue), exact(now + ttl), id .. ':' .. execution)
  redis.call('ZADD', executions_key(id), exact(now + ttl + 60), execution)
  redis.call('EXPIRE', executions_key(id), ttl + 60)
end

-- Delete all that a run has of its own: from now on it owns no lease.
local function end_execution(id, execution, queue, worker)
  redis.call('DEL', execution_key(id, execution))
  redis.call('ZREM', registry_key('wip', queue), id .. ':' .. execution)
  redis.call('ZREM', executions_key(id), execution)
  redis.call('SREM', worker_executions_key(worker), id .. ':' .. execution)
end

-- Whether this execution has lost the lease. If so, delete the rest of it.
local function clear_if_lost(id, execution, queue, worker, status)
  local is_held = owns_lease(id, execution, queue, status)
  if not is_held then end_execution(id, execution, queue, worker) end
  return not is_held
end

-- Whether RQ's own code must end this run, because the job has dependents, repeats, a rate limit or RQ's webhooks. If
-- the job is tried again, only a rate limit counts, because the others matter after the last run only. And RQ writes a
-- retry in several steps, and would lose the job if it was killed between them.
local function needs_rq(id, is_tried_again, repeats_left, rate_limit_key, webhooks)
  if is_tried_again then return rate_limit_key end
  return repeats_left or rate_limit_key or webhooks or redis.call('EXISTS', job_key(id) .. ':dependents') == 1
end

-- Keep an ended job, its results and its entry in a registry for `ttl` seconds; for ever with RQ's -1.
local function set_retention(id, queue, name, ttl, now)
  for _, key in ipairs({job_key(id), results_key(id)}) do
    if ttl < 0 then redis.call('PERSIST', key) else redis.call('EXPIRE', key, ttl) end
  end
  redis.call('ZADD', registry_key(name, queue), ttl < 0 and '+inf' or math.floor(now) + ttl, id)
end

-- Enqueue the message about a job's end, if the job has a webhook. The script that ends the job calls this, so that no
-- end goes without its message. The message carries these fields of the job, as they are now.
local WEBHOOK_FIELDS = {'notify', 'function', 'origin', 'enqueued_at', 'started_at', 'ended_at', 'progress',
  'retries_left', 'error', 'request_id'}
local function notify(id, status, now)
  local job = read(id, unpack(WEBHOOK_FIELDS))
  if not job[1] then return end
  local fields = {}
  for number, name in ipairs(WEBHOOK_FIELDS) do
    if number > 1 then fields[name] = job[number] or '' end
  end
  local message = 'msg_' .. id .. '_' .. microseconds(now)
  -- Up to a tenth more or less, so that messages that failed together are not all tried again together.
  local pauses, jitter = {}, 0.9 + (math.floor(now * 1e6) % 1000) / 5000
  for number, pause in ipairs(RETRY_PAUSES) do pauses[number] = math.floor(pause * jitter * 10) / 10 end
  local payload = {job_id = id, url = job[1], status = status, fields = fields}
  local stamp = timestamp(now)
  redis.call('HSET', job_key(message), 'status', 'queued', 'created_at', stamp, 'enqueued_at', stamp,
    'origin', WEBHOOKS, 'data', cjson.encode({'{DELIVER}', cjson.null, {payload}, cjson.decode('{}')}),
    'description', 'deliver_webhook', 'function', 'deliver_webhook', 'timeout', {RUN_LIMIT},
    'owner', WEBHOOK_OWNER, 'tells', status, 'retries', RETRIES, 'retries_left', RETRIES,
    'retry_intervals', cjson.encode(pauses), 'request_id', job[10] or '')
  redis.call('RPUSH', deliveries_key(id), message)
  redis.call('EXPIRE', deliveries_key(id), MESSAGES_KEPT)
  push(message, WEBHOOKS, false)
  wake_workers()
  log_event(message, 'queued')
  count('enqueued', WEBHOOKS, 'deliver_webhook')
end

-- End a job without success: as `failed`, or as `stopped`, which RQ keeps in the same registry.
local function store_failure(id, was, queue, status, failure_ttl, result, error, now, owner)
  local key, stamp = job_key(id), timestamp(now)
  redis.call('HSET', key, 'status', status, 'ended_at', stamp, 'last_heartbeat', stamp, 'error', error)
  redis.call('XADD', results_key(id), 'MAXLEN', 10, '*', 'type', 2, unpack(result))
  set_retention(id, queue, 'failed', failure_ttl, now)
  change_status(id, was, status, owner)
  count(status, queue, read(id, 'function')[1])
  notify(id, status, now)
end

-- The failure of a job that was stopped on request: the exception's text for RQ, and `error` for the API.
local STOPPED_EXCEPTION, STOPPED_ERROR = '{STOPPED_EXCEPTION}', '{STOPPED_ERROR}'
