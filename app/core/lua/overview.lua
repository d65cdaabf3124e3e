-- The queues and workers as they are at this moment, and what `count` and `observe` counted; it changes nothing.
-- ARGV: queues.
-- Answers {counts, a hash as a flat list; workers, each {name, state, queues with commas, ids of its jobs}; for each queue
-- {jobs queued, started, scheduled, deferred, finished, failed (the stopped ones among them, as RQ keeps them), canceled;
-- age of the oldest waiting job in s or ''; runs that ended in this minute and the last one, their time in microseconds,
-- and how many seconds these minutes are}}.
local now = clock()

-- Anybody may have written there: what is of another type holds nothing.
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
  if worker[1] then -- one that died without a word is in the set, but its own key has run out
    local ids = {}
    for number, execution in ipairs(ask('SMEMBERS', key .. ':executions')) do
      ids[number] = string.match(execution, '^(.*):') or execution
    end
    workers[#workers + 1] = {string.sub(key, #worker_key('') + 1), worker[2] or '', worker[3] or '', ids}
  end
end

local queues = {}
for number, queue in ipairs(ARGV) do
  -- The longest waiting one is the first, unless others were put in front of it or it was canceled there.
  local oldest
  for _, id in ipairs(ask('LRANGE', queue_key(queue), 0, 99)) do
    local job = read(id, 'status', 'enqueued_at')
    local since = job[1] == 'queued' and seconds_since_1970(job[2])
    if since then oldest = math.min(oldest or now, since) end
  end
  local runs, microseconds = 0, 0
  for _, moment in ipairs({now, now - 60}) do
    local minute = ask('HMGET', minute_key(queue, moment), 'runs', 'microseconds')
    runs, microseconds = runs + whole(minute[1], 0), microseconds + (tonumber(minute[2] or '') or 0)
  end
  local function kept(name) return size('ZCOUNT', registry(name, queue), '(' .. exact(now), '+inf') end
  queues[number] = {
    size('LLEN', queue_key(queue)), size('ZCARD', registry('wip', queue)), size('ZCARD', registry('scheduled', queue)),
    size('ZCARD', registry('deferred', queue)), kept('finished'), kept('failed'), kept('canceled'),
    oldest and exact(now - oldest) or '', runs, microseconds, exact(60 + now % 60),
  }
end
return {ask('HGETALL', METRICS), workers, queues}
