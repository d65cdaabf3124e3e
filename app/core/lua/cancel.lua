-- Cancel a job. A job that waits will never run. A job that runs ends `stopped`: this script sends a command to its
-- worker and writes a request into the hash. `renew`, `finish` and `release` see the request, even if the command is
-- lost.
-- ARGV: job id, owner ('*' for anybody; the job must be this owner's), default failure TTL.
-- Answers the job's status: 'canceled'; 'started' if its run was asked to stop; 'stopped', 'finished' or 'failed'; ''
-- if there is no such job.
local id, owner, failure_ttl = unpack(ARGV)
local job = read(id, 'status', 'owner', 'origin', 'worker_name', 'failure_ttl', 'created_at')
local status, queue = job[1], job[3] or ''
if not (status and job[6]) or (owner ~= '*' and owner ~= (job[2] or '')) then return '' end
if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then return status end

local now, ttl = clock(), integer(job[5], failure_ttl)
if status == 'started' then
  local worker, running = job[4] or '', nil
  for _, execution in ipairs(redis.call('ZRANGE', executions_key(id), 0, -1)) do
    local run = redis.call('HMGET', execution_key(id, execution), 'job_id', 'lease_until')
    -- The run of a stock worker has no lease.
    if not run[1] or number(run[2], math.huge) < now then
      end_execution(id, execution, queue, worker) -- its worker is dead, or is cut off and must write nothing more
    elseif owns_lease(id, execution, queue, status) then
      -- The request names the run, so that it stops no later run. It is a field of the job, because the run's own key
      -- may have expired before a worker recovers the job.
      running = execution
      redis.call('HSET', job_key(id), 'stop_requested', execution)
    end
  end
  if running then
    -- The command of RQ's `send_stop_job_command`, with the id of the run.
    redis.call('PUBLISH', RQ .. ':pubsub:' .. worker,
      cjson.encode({command = 'stop-job', job_id = id, execution = running}))
    return 'started'
  end
  store_failure(id, status, queue, 'stopped', ttl, {'exc_string', STOPPED_EXCEPTION}, STOPPED_ERROR, now, job[2])
  return 'stopped'
end

-- Remove the job from the list if it is near one of the two ends. A search through a million jobs would keep all other
-- clients of Redis waiting. If the id stays in the list, `take` skips it.
if redis.call('LPOS', queue_key(queue), id, 'MAXLEN', 1000) then
  redis.call('LREM', queue_key(queue), 1, id)
elseif redis.call('LPOS', queue_key(queue), id, 'RANK', -1, 'MAXLEN', 1000) then
  redis.call('LREM', queue_key(queue), -1, id)
end
redis.call('ZREM', registry_key('scheduled', queue), id)
redis.call('ZREM', registry_key('deferred', queue), id)
redis.call('HSET', job_key(id), 'status', 'canceled', 'ended_at', timestamp(now))
set_retention(id, queue, 'canceled', ttl, now)
change_status(id, status, 'canceled', job[2])
count('canceled', queue, read(id, 'function')[1])
notify(id, 'canceled', now)
return 'canceled'
