-- Take the first waiting job of the worker's queues, in their order, and start a run of it under a lease.
-- ARGV: worker, id for the new execution, lease in seconds, queues.
-- Answers {'taken', queue, job id, start of the run, the job's FIELDS as they were before}; {'nothing', last id of the
-- doorbell}; {'skipped', queue, job id, reason} if the key of the job is no hash; {'again'} after a thousand entries
-- that need no run; {'suspended'} after `rq suspend`.
local FIELDS = {'status', 'data', 'timeout', 'enqueued_at', 'crashes', 'function', 'request_id',
  'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks'}
local worker, execution, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = clock()

-- If the worker sends the same call again, because the answer was lost, it gets the same answer.
for _, member in ipairs(redis.call('SMEMBERS', worker_executions_key(worker))) do
  local id, found = string.match(member, '^(.*):(.*)$')
  if found == execution then
    local job = redis.call('HMGET', job_key(id), 'origin', 'started_at', unpack(FIELDS))
    local queue, started_at = table.remove(job, 1), table.remove(job, 1)
    if queue and owns_lease(id, execution, queue, job[1]) then
      return {'taken', queue, id, started_at, job}
    end
  end
end

if redis.call('EXISTS', RQ .. ':suspended') == 1 then return {'suspended'} end

-- Skip an entry whose job has one of these statuses: it was canceled meanwhile, or pushed twice. A job whose status is
-- no known word is taken, too: the worker cannot read it, and fails it with a message.
local skipped_statuses = {started = 1, finished = 1, failed = 1, stopped = 1, canceled = 1, scheduled = 1, deferred = 1}

local skipped = 0
for position = 4, #ARGV do
  local queue = ARGV[position]
  redis.call('ZCARD', registry_key('wip', queue)) -- raises before the pop if the key has another type
  local id = redis.call('LPOP', queue_key(queue))
  while id do
    local key = job_key(id)
    local job = redis.pcall('HMGET', key, 'owner', unpack(FIELDS))
    if job.err then return {'skipped', queue, id, job.err} end
    local owner = table.remove(job, 1)
    if (job[1] or job[2]) and not skipped_statuses[job[1]] then
      local stamp = timestamp(now)
      -- A key of this job that has another type would make a script raise half-way. Delete it.
      local executions, results = executions_key(id), results_key(id)
      if redis.call('EXISTS', executions, results) > 0 then
        for name, kind in pairs({[executions] = 'zset', [results] = 'stream'}) do
          if redis.call('TYPE', name).ok ~= kind then redis.call('DEL', name) end
        end
      end
      redis.call('HSET', key, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp, 'worker_name', worker,
        'origin', queue)
      redis.call('PERSIST', key)
      redis.call('SADD', worker_executions_key(worker), id .. ':' .. execution)
      extend_lease(id, execution, queue, worker, lease, now)
      redis.call('HSET', worker_key(worker), 'state', 'busy')
      change_status(id, job[1] or 'queued', 'started', owner)
      observe('wait', job[6], math.max(0, now - (seconds_since_1970(job[4]) or now)))
      return {'taken', queue, id, stamp, job}
    end
    -- A million canceled jobs must not keep all other clients of Redis waiting.
    skipped = skipped + 1
    if skipped == 1000 then return {'again'} end
    id = redis.call('LPOP', queue_key(queue))
  end
end

redis.call('HSET', worker_key(worker), 'state', 'idle')
local last = redis.call('XREVRANGE', DOORBELL, '+', '-', 'COUNT', 1)
return {'nothing', last[1] and last[1][1] or '0-0'}
