-- Cancel a job in whatever state it is. One that waits never runs; one that runs ends `stopped` as soon as its worker
-- knows: `renew`, `finish` and `release` see the request, whether or not the worker hears the message.
-- ARGV: job id, owner of whom it must be ('*' for anybody), default failure TTL.
-- Answers the job's status: 'canceled', 'stopped', or 'started' while it is being stopped; 'finished' or 'failed' if it
-- had ended; '' if there is no such job.
local id, owner, failure_ttl = unpack(ARGV)
local job = read(id, 'status', 'owner', 'origin', 'worker_name', 'failure_ttl', 'created_at')
local status, queue = job[1], job[3] or ''
if not (status and job[6]) or (owner ~= '*' and owner ~= (job[2] or '')) then return '' end
if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then return status end

local now, ttl = clock(), whole(job[5], failure_ttl)
if status == 'started' then
  local worker, running = job[4] or '', nil
  for _, execution in ipairs(redis.call('ZRANGE', registry('executions', id), 0, -1)) do
    local run = redis.call('HMGET', execution_key(id, execution), 'job_id', 'lease_until')
    -- A stock worker's run has no lease.
    if not run[1] or number(run[2], math.huge) < now then
      end_execution(id, execution, queue, worker) -- its worker is dead, or can write nothing more
    elseif holds(id, execution, queue, status) then
      -- The request names the run, so it is for no later one; it stands at the job, which is there however late somebody
      -- recovers it.
      running = execution
      redis.call('HSET', job_key(id), 'stop_requested', execution)
    end
  end
  if running then
    -- The command that RQ's own `send_stop_job_command` sends, and which run it is for.
    redis.call('PUBLISH', RQ .. ':pubsub:' .. worker, cjson.encode({command = 'stop-job', job_id = id, execution = running}))
    return 'started'
  end
  end_badly(id, status, queue, 'stopped', ttl, {'exc_string', STOPPED_EXCEPTION}, STOPPED_ERROR, now, job[2])
  return 'stopped'
end

-- Out of the list if it is near one of its ends. A search through a million jobs would keep Redis from all others; what
-- is left in the list `take` skips.
if redis.call('LPOS', queue_key(queue), id, 'MAXLEN', 1000) then
  redis.call('LREM', queue_key(queue), 1, id)
elseif redis.call('LPOS', queue_key(queue), id, 'RANK', -1, 'MAXLEN', 1000) then
  redis.call('LREM', queue_key(queue), -1, id)
end
redis.call('ZREM', registry('scheduled', queue), id)
redis.call('ZREM', registry('deferred', queue), id)
redis.call('HSET', job_key(id), 'status', 'canceled', 'ended_at', timestamp(now))
keep(id, queue, 'canceled', ttl, now)
move(id, status, 'canceled', job[2])
count('canceled', queue, read(id, 'function')[1])
notify(id, 'canceled', now)
return 'canceled'
