-- Extend the lease of a run, and store its progress.
-- ARGV: job id, execution id, queue, worker, lease in seconds, progress (JSON or ''), the function's crash limit or ''.
-- Answers 'held'; 'lost' if the run does not own the lease any more; 'stop' if the job was canceled. After the last two
-- the worker ends the run.
local id, execution, queue, worker, lease, progress, max_crashes = unpack(ARGV)
local job = read(id, 'status', 'stop_requested')
if clear_if_lost(id, execution, queue, worker, job[1]) then return 'lost' end

local now = clock()
extend_lease(id, execution, queue, worker, tonumber(lease), now)
redis.call('HSET', job_key(id), 'last_heartbeat', timestamp(now))
-- Another worker may not know the function: `recover` reads its limit here.
if max_crashes ~= '' then redis.call('HSET', job_key(id), 'max_crashes', max_crashes) end
if progress ~= '' then
  redis.call('HSET', job_key(id), 'progress', progress)
  log_event(id, 'started')
end
return job[2] == execution and 'stop' or 'held'
