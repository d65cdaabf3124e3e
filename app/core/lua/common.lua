-- What the transitions share. transitions.py puts this text in front of each script and RQ's key prefix in place of
-- {RQ}. Keys are built here from ids: one Redis, not a cluster, as with RQ itself.

local RQ = '{RQ}'
local EVENTS = RQ .. ':api:events'     -- the event log: what happened to which job, bounded
local DOORBELL = RQ .. ':api:doorbell' -- a stream of length 1: "some queue has a job"
local EVENTS_KEPT = 10000

-- RQ's cleaners fail a job once its score in the started registry has passed. Ours is this many seconds later than the
-- lease, so that `recover` comes first: also when `rq info` runs RQ's cleanup while all workers are away for the night.
-- What the run has of its own is kept as long.
local GRACE = 86400

local function job_key(id) return RQ .. ':job:' .. id end
local function queue_key(queue) return RQ .. ':queue:' .. queue end
local function registry(name, queue) return RQ .. ':' .. name .. ':' .. queue end
local function worker_key(worker) return RQ .. ':worker:' .. worker end

-- Fields of a job's hash. Anybody may have written to Redis: what is no hash has no fields, and what is no number is
-- the default. A script must not raise half-way, since what it did before stays done.
local function read(id, ...)
  local values = redis.pcall('HMGET', job_key(id), ...)
  return values.err and {} or values
end

local function number(value, default)
  local found = tonumber(value or '')
  if found and found == found and math.abs(found) < 1e11 then return found end
  return default
end

local function whole(value, default) return math.floor(number(value, default)) end

-- Redis' clock, in seconds. Scripts use no other.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- Seconds since 1970 as RQ writes a time: 2026-11-23T10:00:00.123456Z. The sandbox has no os.date; the calendar
-- arithmetic is that of H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
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

-- The other way round; nil if it is no such time.
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

-- A number of seconds with its microseconds (Lua's own tostring keeps 14 digits only).
local function exact(seconds) return string.format('%.6f', seconds) end

local function tell(id, status)
  redis.call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'job_id', id, 'status', status)
end

-- What happened, for `/metrics`: a hash with a number for each `event:queue:function`. By `pcall`: no transition is held
-- up by what somebody may have written there.
local METRICS = RQ .. ':api:metrics'
local function count(event, queue, fn, by)
  redis.pcall('HINCRBY', METRICS, event .. ':' .. queue .. ':' .. (fn or ''), by or 1)
end

-- How long jobs of a function wait, or run: in the same hash how many took no longer than each bound and longer than the
-- one before, as `wait:number of the bound:function`; and as number 0 the sum, in microseconds.
local function observe(what, fn, seconds)
  local bounds, number = {{BOUNDS}}, 1
  while bounds[number] and seconds > bounds[number] do number = number + 1 end
  redis.pcall('HINCRBY', METRICS, what .. ':' .. number .. ':' .. (fn or ''), 1)
  redis.pcall('HINCRBY', METRICS, what .. ':0:' .. (fn or ''), math.floor(seconds * 1e6))
end

-- What `/queues` calls recent: how many runs of a queue's jobs ended in a minute, and their time in microseconds.
local function minute_key(queue, now) return RQ .. ':api:minute:' .. queue .. ':' .. math.floor(now / 60) end

-- The index that `/jobs` reads: for each scope (the jobs of one owner, and '' for all jobs) and each status a sorted
-- set of job ids, by the microsecond of their creation. A job is in one set of a scope at a time, so its status is
-- found without looking at other jobs, and the jobs of all statuses are the merger of a few sets. An entry takes 111
-- bytes (benchmarks/RESULTS.md); a job of an owner has two.
local STATUSES = {'queued', 'started', 'deferred', 'scheduled', 'finished', 'failed', 'stopped', 'canceled'}
local OWNERS = RQ .. ':api:owners'
local NOBODY = 'webhooks:' -- the owner of messages to webhooks, which is no key's name; they are in no list
local function index(scope, status) return RQ .. ':api:jobs:' .. scope .. ':' .. status end

-- `owner` is that of the job's hash, if somebody has read it already.
local function scopes(id, owner)
  if owner == nil then owner = read(id, 'owner')[1] end
  if not owner or owner == '' then return {''} end
  if owner == NOBODY then return {} end
  return {'', owner}
end

local function microseconds(seconds) return string.format('%.0f', seconds * 1e6) end

-- Take a job out of a scope of the index. Answers the microsecond of its creation, nil if it was not there.
local function remove_from_index(scope, id, status)
  local created = redis.call('ZSCORE', index(scope, status), id)
  if not created then
    -- In another status' set if RQ's own code changed it meanwhile, which knows no index.
    for _, each in ipairs(STATUSES) do
      status, created = each, redis.call('ZSCORE', index(scope, each), id)
      if created then break end
    end
  end
  if created then redis.call('ZREM', index(scope, status), id) end
  return created
end

-- A job goes from one status to another: the index follows, and the event log says so.
local function move(id, was, status, owner)
  for _, scope in ipairs(scopes(id, owner)) do
    local created = remove_from_index(scope, id, was)
    if not created and scope ~= '' then redis.call('SADD', OWNERS, scope) end
    redis.call('ZADD', index(scope, status), created or microseconds(clock()), id)
  end
  tell(id, status)
end

-- Webhooks: a job that has `notify`, a URL, tells it of its end. The message is a job too, on this queue.
local WEBHOOKS = '{WEBHOOKS}'
-- Seconds between its tries, as Standard Webhooks recommends (its section "Deliverability and reliability").
local PAUSES = {5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400}
local TRIES = #PAUSES
-- Seconds that a job's messages are listed, if none is delivered: the tries, and the week that a failure is kept.
local MESSAGES_KEPT = {MESSAGES_KEPT}
local function deliveries_key(id) return RQ .. ':api:webhooks:' .. id end
local function tries_key(id) return RQ .. ':api:tries:' .. id end

local function ring()
  redis.call('XADD', DOORBELL, 'MAXLEN', 1, '*', 'rung', 1)
end

local function push(id, queue, at_front)
  redis.call('SADD', RQ .. ':queues', queue_key(queue))
  redis.call(at_front and 'LPUSH' or 'RPUSH', queue_key(queue), id)
end

-- A job that was elsewhere waits in its queue again.
local function make_waiting(id, was, queue, at_front, now)
  redis.call('HSET', job_key(id), 'status', 'queued', 'enqueued_at', timestamp(now), 'started_at', '', 'ended_at', '',
    'worker_name', '')
  redis.call('HDEL', job_key(id), 'progress', 'error')
  push(id, queue, at_front)
  ring()
  move(id, was, 'queued')
end

-- Jobs that a queue holds, now and later: what MAX_QUEUE_LENGTH bounds.
local function length(queue)
  return redis.call('LLEN', queue_key(queue)) + redis.call('ZCARD', registry('scheduled', queue))
end

local function execution_key(id, execution) return RQ .. ':execution:' .. id .. ':' .. execution end

-- Whether this execution still has the job, which has this status. It is the fence in front of all that a worker
-- writes: `recover`, a cancel and RQ's own cleanup take the entry away, and a status that is not `started` means that
-- somebody else decided.
local function holds(id, execution, queue, status)
  return status == 'started' and redis.call('ZSCORE', registry('wip', queue), id .. ':' .. execution)
end

local function extend_lease(id, execution, queue, worker, lease, now)
  local ttl = math.ceil(lease) + GRACE
  -- First what needs no memory: after it a script may write also where Redis is full, and a lease must not run out there.
  redis.call('EXPIRE', worker_key(worker) .. ':executions', ttl + 60)
  -- All of it: what had expired would be half a run, which RQ cannot read and `cancel` takes for a dead worker's.
  redis.call('HSET', execution_key(id, execution), 'id', execution, 'job_id', id, 'worker_name', worker,
    'last_heartbeat', exact(now), 'lease_until', exact(now + lease))
  redis.call('HSETNX', execution_key(id, execution), 'created_at', exact(now))
  redis.call('EXPIRE', execution_key(id, execution), ttl)
  redis.call('ZADD', registry('wip', queue), exact(now + ttl), id .. ':' .. execution)
  redis.call('ZADD', registry('executions', id), exact(now + ttl + 60), execution)
  redis.call('EXPIRE', registry('executions', id), ttl + 60)
end

local function end_execution(id, execution, queue, worker)
  redis.call('DEL', execution_key(id, execution))
  redis.call('ZREM', registry('wip', queue), id .. ':' .. execution)
  redis.call('ZREM', registry('executions', id), execution)
  redis.call('SREM', worker_key(worker) .. ':executions', id .. ':' .. execution)
end

-- Whether this execution has the job no more; then nothing of it is left.
local function is_lost(id, execution, queue, worker, status)
  local is_held = holds(id, execution, queue, status)
  if not is_held then end_execution(id, execution, queue, worker) end
  return not is_held
end

-- Whether the job has what only RQ's own code handles: dependents, repeats, a rate limit, RQ's webhooks. All but the rate
-- limit wait for its last run; RQ writes a retry in several steps, and loses the job if it is killed between them.
local function wants_rq(id, is_tried_again, repeats_left, rate_limit_key, webhooks)
  if is_tried_again then return rate_limit_key end
  return repeats_left or rate_limit_key or webhooks or redis.call('EXISTS', job_key(id) .. ':dependents') == 1
end

-- An ended job, its results and its entry in a registry are kept for so many seconds; for ever with RQ's -1.
local function keep(id, queue, name, ttl, now)
  for _, key in ipairs({job_key(id), registry('results', id)}) do
    if ttl < 0 then redis.call('PERSIST', key) else redis.call('EXPIRE', key, ttl) end
  end
  redis.call('ZADD', registry(name, queue), ttl < 0 and '+inf' or math.floor(now) + ttl, id)
end

-- The message that tells of a job's end, if somebody is to be told. It is in its queue as soon as the job has ended.
local NOTICED = {'notify', 'function', 'origin', 'enqueued_at', 'started_at', 'ended_at', 'progress', 'retries_left', 'error',
  'request_id'}
local function notify(id, status, now)
  local job = read(id, unpack(NOTICED))
  if not job[1] then return end
  local fields = {}
  for number, name in ipairs(NOTICED) do
    if number > 1 then fields[name] = job[number] or '' end
  end
  local message = 'msg_' .. id .. '_' .. microseconds(now)
  -- Those that fail together do not all come back together: a tenth more or less.
  local pauses, jitter = {}, 0.9 + (math.floor(now * 1e6) % 1000) / 5000
  for number, pause in ipairs(PAUSES) do pauses[number] = math.floor(pause * jitter * 10) / 10 end
  local payload = {job_id = id, url = job[1], status = status, fields = fields}
  local stamp = timestamp(now)
  redis.call('HSET', job_key(message), 'status', 'queued', 'created_at', stamp, 'enqueued_at', stamp, 'origin', WEBHOOKS,
    'data', cjson.encode({'{DELIVER}', cjson.null, {payload}, cjson.decode('{}')}), 'description', 'deliver_webhook',
    'function', 'deliver_webhook', 'timeout', {RUN_LIMIT}, 'owner', NOBODY, 'tells', status,
    'retries', TRIES, 'retries_left', TRIES, 'retry_intervals', cjson.encode(pauses), 'request_id', job[10] or '')
  redis.call('RPUSH', deliveries_key(id), message)
  redis.call('EXPIRE', deliveries_key(id), MESSAGES_KEPT)
  push(message, WEBHOOKS, false)
  ring()
  tell(message, 'queued')
  count('enqueued', WEBHOOKS, 'deliver_webhook')
end

-- A job that ended without success: `failed`, or `stopped`, which RQ keeps in the same registry.
local function end_badly(id, was, queue, status, failure_ttl, result, error, now, owner)
  local key, stamp = job_key(id), timestamp(now)
  redis.call('HSET', key, 'status', status, 'ended_at', stamp, 'last_heartbeat', stamp, 'error', error)
  redis.call('XADD', registry('results', id), 'MAXLEN', 10, '*', 'type', 2, unpack(result))
  keep(id, queue, 'failed', failure_ttl, now)
  move(id, was, status, owner)
  count(status, queue, read(id, 'function')[1])
  notify(id, status, now)
end

-- What a job that was stopped on request says of it: RQ's text of an exception, and our `error`.
local STOPPED_EXCEPTION, STOPPED_ERROR = '{STOPPED_EXCEPTION}', '{STOPPED_ERROR}'
