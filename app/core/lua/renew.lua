-- Extend the lease of a running job, and pass its progress on.
-- ARGV: job id, execution id, queue, worker, lease in seconds, progress as JSON or '', crash limit of its function or ''.
-- Answers 'held', 'lost', or 'stop' if somebody canceled the job; after both the worker ends the run.
local id, execution, queue, worker, lease, progress, max_crashes = unpack(ARGV)
local job = read(id, 'status', 'stop_requested')
if is_lost(id, execution, queue, worker, job[1]) then return 'lost' end

local now = clock()
extend_lease(id, execution, queue, worker, tonumber(lease), now)
redis.call('HSET', job_key(id), 'last_heartbeat', timestamp(now))
-- `recover` reads it, wherever it runs.
if max_crashes ~= '' then redis.call('HSET', job_key(id), 'max_crashes', max_crashes) end
if progress ~= '' then
  redis.call('HSET', job_key(id), 'progress', progress)
  tell(id, 'started')
end
return job[2] == execution and 'stop' or 'held'
