-- Read the state of the queues and the workers at this moment, and the counts of `count` and `observe`. It changes
-- nothing.
-- ARGV: queues.
-- Answers {counts, a hash as a flat list; workers, each {name, state, queues with commas, ids of its jobs}; for each
-- queue {number of jobs queued, started, scheduled, deferred, finished, failed (with the stopped ones, as in RQ's
-- registry) and canceled; age of the oldest waiting job in seconds or ''; runs that ended in this minute and the one
-- before, their time in microseconds, and the seconds since the minute before began}}.
local now = clock()

-- Other programs may write to Redis, too: a key of another type counts as empty.
local function ask(...)
  local answer = redis.pcall(...)
  return type(answer) == 'table' and answer.err and {} or answer
end
local function size(...)
  local answer = ask(...)
  return type(answer) == 'number' and answer or 0
end

local workers = {}
for _, key in ipairs(ask('SMEMBERS', RQ .. ':workers')) do
  local worker = ask('HMGET', key, 'birth', 'state', 'queues')
  if worker[1] then -- a killed worker is still in the set, but its own key has expired
    local ids = {}
    for number, execution in ipairs(ask('SMEMBERS', key .. ':executions')) do
      ids[number] = string.match(execution, '^(.*):') or execution
    end
    workers[#workers + 1] = {string.sub(key, #worker_key('') + 1), worker[2] or '', worker[3] or '', ids}
  end
end

local queues = {}
for number, queue in ipairs(ARGV) do
  -- The first job has waited longest, unless other jobs were put in front of it, or it was canceled in the list.
  local oldest
  for _, id in ipairs(ask('LRANGE', queue_key(queue), 0, 99)) do
    local job = read(id, 'status', 'enqueued_at')
    local since = job[1] == 'queued' and seconds_since_1970(job[2])
    if since then oldest = math.min(oldest or now, since) end
  end
  local runs, microseconds = 0, 0
  for _, moment in ipairs({now, now - 60}) do
    local minute = ask('HMGET', minute_key(queue, moment), 'runs', 'microseconds')
    runs, microseconds = runs + integer(minute[1], 0), microseconds + (tonumber(minute[2] or '') or 0)
  end
  local function kept(name) return size('ZCOUNT', registry_key(name, queue), '(' .. exact(now), '+inf') end
  queues[number] = {
    size('LLEN', queue_key(queue)), size('ZCARD', registry_key('wip', queue)),
    size('ZCARD', registry_key('scheduled', queue)), size('ZCARD', registry_key('deferred', queue)),
    kept('finished'), kept('failed'), kept('canceled'),
    oldest and exact(now - oldest) or '', runs, microseconds, exact(60 + now % 60),
  }
end
return {ask('HGETALL', METRICS), workers, queues}
