-- The first waiting job of the worker's queues, in their order, under a lease.
-- ARGV: worker, id for the new execution, lease in seconds, queues.
-- Answers {'taken', queue, job id, start of the run, FIELDS of the job as they were}, {'nothing', last id of the doorbell},
-- {'skipped', queue, job id, reason} for what cannot be a job, {'again'} after many entries that are no jobs any more, or
-- {'suspended'}.
local FIELDS = {'status', 'data', 'timeout', 'enqueued_at', 'crashes', 'function', 'request_id', 'success_callback_name',
  'failure_callback_name', 'stopped_callback_name', 'webhooks'}
local worker, execution, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = clock()

-- The same call again, because its answer was lost: the same answer.
for _, member in ipairs(redis.call('SMEMBERS', worker_key(worker) .. ':executions')) do
  local id, found = string.match(member, '^(.*):(.*)$')
  if found == execution then
    local job = redis.call('HMGET', job_key(id), 'origin', 'started_at', unpack(FIELDS))
    local queue, started_at = table.remove(job, 1), table.remove(job, 1)
    if queue and holds(id, execution, queue, job[1]) then
      return {'taken', queue, id, started_at, job}
    end
  end
end

if redis.call('EXISTS', RQ .. ':suspended') == 1 then return {'suspended'} end

-- What a job in the list may be and still has to be run. Anything that is not a status at all is taken too: the worker
-- cannot read such a job, and fails it with a message. The rest (canceled meanwhile, pushed twice, …) is skipped.
local settled = {started = 1, finished = 1, failed = 1, stopped = 1, canceled = 1, scheduled = 1, deferred = 1}

local skipped = 0
for position = 4, #ARGV do
  local queue = ARGV[position]
  redis.call('ZCARD', registry('wip', queue)) -- raises, before anything is popped, if no run could be noted there
  local id = redis.call('LPOP', queue_key(queue))
  while id do
    local key = job_key(id)
    local job = redis.pcall('HMGET', key, 'owner', unpack(FIELDS))
    if job.err then return {'skipped', queue, id, job.err} end
    local owner = table.remove(job, 1)
    if (job[1] or job[2]) and not settled[job[1]] then
      local stamp = timestamp(now)
      -- What stands under a name of this job's own and is of another type would stop a script half-way.
      local executions, results = registry('executions', id), registry('results', id)
      if redis.call('EXISTS', executions, results) > 0 then
        for name, kind in pairs({[executions] = 'zset', [results] = 'stream'}) do
          if redis.call('TYPE', name).ok ~= kind then redis.call('DEL', name) end
        end
      end
      redis.call('HSET', key, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp, 'worker_name', worker,
        'origin', queue)
      redis.call('PERSIST', key)
      redis.call('SADD', worker_key(worker) .. ':executions', id .. ':' .. execution)
      extend_lease(id, execution, queue, worker, lease, now)
      redis.call('HSET', worker_key(worker), 'state', 'busy')
      move(id, job[1] or 'queued', 'started', owner)
      observe('wait', job[6], math.max(0, now - (seconds_since_1970(job[4]) or now)))
      return {'taken', queue, id, stamp, job}
    end
    -- A million canceled jobs must not keep Redis from all others.
    skipped = skipped + 1
    if skipped == 1000 then return {'again'} end
    id = redis.call('LPOP', queue_key(queue))
  end
end

redis.call('HSET', worker_key(worker), 'state', 'idle')
local last = redis.call('XREVRANGE', DOORBELL, '+', '-', 'COUNT', 1)
return {'nothing', last[1] and last[1][1] or '0-0'}
