-- Give a job back that its worker could not bring to an end: in front of its queue, or failed when its runs crashed
-- too often.
-- ARGV: job id, execution id, queue, worker, crashed (1 or 0), crash limit, exception (base64 of zlib), error (JSON),
-- default failure TTL.
-- Answers 'queued', 'failed' or 'lost'.
local id, execution, queue, worker, crashed, limit, exception, error, failure_ttl = unpack(ARGV)
local held = holds(id, execution, queue)
end_execution(id, execution, queue, worker)
if not held then return 'lost' end

local now = clock()
local job = read(id, 'crashes', 'failure_ttl')
local crashes = whole(job[1], 0) + tonumber(crashed)
if crashed == '1' then redis.call('HSET', job_key(id), 'crashes', crashes) end
if crashed == '1' and crashes > tonumber(limit) then
  count(worker, 'failed_job_count', 0)
  end_badly(id, queue, 'failed', whole(job[2], failure_ttl), {'worker_name', worker, 'execution_id', execution, 'exc_string', exception},
    error, now)
  return 'failed'
end
make_waiting(id, queue, true, now)
return 'queued'
